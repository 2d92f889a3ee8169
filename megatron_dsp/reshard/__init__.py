"""Moving shards: the primitives with their adjoints, the exchange that carries them, and the ledger of what was moved."""

from megatron_dsp.reshard.ledger import Ledger, ledger
from megatron_dsp.reshard.primitives import gather, mean, mean_loss, split, switch
from megatron_dsp.reshard.region import Region

__all__ = ["Ledger", "Region", "gather", "ledger", "mean", "mean_loss", "split", "switch"]
