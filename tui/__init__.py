"""The Textual apps: the setup wizard and the live dashboard; never imports torch."""
