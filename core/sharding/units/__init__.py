"""Units: parameters that are gathered, reduced and stepped together, and the flat buffers that hold them.

Way in: `partition` says which parameters form a unit, `layout` where each lies, `unit.Unit` owns the buffers. Knows
the transport and the homes' interface; never a module's forward nor an optimizer's rule.
"""
