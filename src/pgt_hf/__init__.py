"""PowerGrad Transform (PGT) for the Hugging Face ecosystem.

PGT changes one thing in training: the backward pass at the softmax uses ``softmax(alpha z)`` in place of
``softmax(z)`` (Das et al., "Altering Backward Pass Gradients improves Convergence", arXiv 2111.12495). Importing this
package also makes ``optim="powergrad_sgd"`` known to ``transformers.Trainer``.
"""

from ._import_hook import register_with_trainer
from ._lazy import exports

__version__ = "0.1.0.dev0"
__getattr__, __all__ = exports(__name__)

register_with_trainer()
