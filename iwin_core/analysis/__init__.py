"""What a model mixes and looks at: functions on models and tensors."""
