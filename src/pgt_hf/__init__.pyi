from .attach import PowerGradHandle as PowerGradHandle
from .attach import attach_powergrad as attach_powergrad
from .functional import powergrad_cross_entropy as powergrad_cross_entropy
from .functional import powergrad_linear_cross_entropy as powergrad_linear_cross_entropy
from .functional import powergrad_log_softmax as powergrad_log_softmax
from .heads import fold_powergrad as fold_powergrad
from .logits import PowerGradLogits as PowerGradLogits
from .loss import PowerGradCrossEntropyLoss as PowerGradCrossEntropyLoss
from .optim import bind_powergrad as bind_powergrad
from .optim import create_optimizer as create_optimizer
from .optim import list_optimizers as list_optimizers
from .schedules import AlphaScheduler as AlphaScheduler
from .trainer.alpha_callback import AlphaScheduleCallback as AlphaScheduleCallback
from .trainer.arguments import PowerGradTrainingArguments as PowerGradTrainingArguments
from .trainer.hp_space import powergrad_hp_space as powergrad_hp_space
from .trainer.image_arguments import ImageTrainingArguments as ImageTrainingArguments
from .trainer.images import ImageTrainer as ImageTrainer
from .trainer.powergrad import PowerGradTrainer as PowerGradTrainer

__version__: str
