"""What a rank tells its daemon; never imports torch."""
