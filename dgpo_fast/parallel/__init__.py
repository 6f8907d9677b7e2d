"""Everything that knows of other processes: the only user of torch.distributed."""
