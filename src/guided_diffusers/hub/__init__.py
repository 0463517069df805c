"""A pipeline from its trained parts; publishing on the Hub, and downloading.

    assemble("out/photos", "out/unet", "out/classifier")     # guided-diffusers assemble ...
    pipeline.push_to_hub("user/model")       # or a NoiseAwareClassifier, or a NoiseAwareCLIP
    push("folder", "user/model")             # guided-diffusers push FOLDER REPO
    pull("user/model", "folder")             # guided-diffusers pull REPO FOLDER

Everything that is published is first collected in a temporary folder (`prepare`): weights, configs,
metrics, the code that loads the model without this package, a model card and a picture. Files that
must not be published are refused, and the folder is loaded in a clean process without this package,
where its output must be the same (`check`). All files are uploaded in one commit, so an interrupted
upload leaves the repository unchanged.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_imports

if TYPE_CHECKING:
    from .download import pull
    from .parts import assemble
    from .publish import push, push_to_hub
    from .staging import card, prepare
    from .verification import check

__all__ = ["assemble", "card", "check", "prepare", "pull", "push", "push_to_hub"]

__getattr__, __dir__ = lazy_imports(__name__)
