"""What will a run need, before it is started? `estimate.make_plan` says it; nothing is loaded or trained for that."""
