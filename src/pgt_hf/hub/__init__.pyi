from .publish import PublishCallback as PublishCallback
from .release import prepare_release as prepare_release
from .release import pull_checkpoint as pull_checkpoint
from .release import push_run as push_run
from .upload import check_push_access as check_push_access
from .upload import push_release as push_release
