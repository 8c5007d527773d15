"""Training of routers by distillation: capture what a frozen model does with texts, then fit each layer's router."""
