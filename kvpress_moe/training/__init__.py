"""Training of routers by distillation: capture a frozen model's states, fit each layer's router, tune all layers."""
