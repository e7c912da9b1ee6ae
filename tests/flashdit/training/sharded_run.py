"""Run by torchrun from a test: trains with FSDP2 on CPU processes.

Accelerate turns sharding on for accelerators alone; on gloo the same code runs once its state says so.
"""

import sys

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from flashdit import config
from flashdit.trainer import Trainer
from flashdit.training import accelerator as run_accelerator
from flashdit.training.accelerator import set_shard_precision

make_accelerator = run_accelerator.make_accelerator


def make_sharding_accelerator(training):
    accelerator = make_accelerator(training)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    set_shard_precision(accelerator, training.precision)
    return accelerator


run_accelerator.make_accelerator = make_sharding_accelerator
trainer = Trainer(config.load(None, sys.argv[1:]))
sharded = [name for name, p in trainer.model.named_parameters() if isinstance(p, DTensor)]
assert len(sharded) == len(list(trainer.model.parameters())), "every parameter lies in shards"
assert all(isinstance(value, DTensor) for value in trainer.ema.average.values()), "and so does the average"
trainer.fit()
