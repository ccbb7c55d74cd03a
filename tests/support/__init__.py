"""What tests share: a fake model provider, and how the real agents are started. Never part of the product."""
