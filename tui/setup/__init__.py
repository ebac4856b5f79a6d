"""The setup wizard: hardware, model, strategy, cluster, review.

Way in: `app.run_wizard`. `model.WizardState` has the answers and what follows from them, without a screen; each
`*_step` shows one page of it, `planning` and `consequences` say what a choice leads to. Must not write before Review,
nor predict anything itself: the planner does.
"""
