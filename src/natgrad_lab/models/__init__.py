"""Networks as plain torch modules, each described by a small frozen dataclass."""

from natgrad_lab.models.architecture import Architecture
from natgrad_lab.models.imagenet import ImageResNet
from natgrad_lab.models.mlp import Mlp
from natgrad_lab.models.preactivation import PreActResNet
from natgrad_lab.models.resnet import CifarResNet
from natgrad_lab.models.transformer import Transformer
from natgrad_lab.models.user import UserModel
from natgrad_lab.models.vgg import Vgg16

NETWORKS: dict[str, type[Architecture]] = {
    "CifarResNet": CifarResNet,
    "ImageResNet": ImageResNet,
    "Mlp": Mlp,
    "PreActResNet": PreActResNet,
    "Transformer": Transformer,
    "Vgg16": Vgg16,
}
"""What --model takes, beside import paths."""

__all__ = [
    "NETWORKS",
    "Architecture",
    "CifarResNet",
    "ImageResNet",
    "Mlp",
    "PreActResNet",
    "Transformer",
    "UserModel",
    "Vgg16",
]
