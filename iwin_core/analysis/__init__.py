"""Which tokens a model mixes and which pixels it responds to: functions on models and tensors."""
