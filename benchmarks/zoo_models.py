"""Tiny configurations of models that people have, built without downloads: each a model and its mean loss."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

N = 6  # samples of a batch


class Zoo(NamedTuple):
    """A network, what it takes, and the loss of some samples.

    needs: packages beside torch. share: the least share of weights with a curvature of their own. alone: whether the
    loss of a sample does not depend on others, and no part of the network counts as one sample's that is not.
    """

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    needs: tuple[str, ...] = ()
    share: float = 0.95
    alone: bool = True


def there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(high: int, *shape: int, low: int = 3, seed: int = 2) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


TEXT, CLASSES = tokens(50, N, 8), torch.arange(N) % 3


def like(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x.to(next(p for p in model.parameters()).dtype)


def classified(*shape: int) -> Callable[[nn.Module, Any], torch.Tensor]:
    x = noise(N, *shape)
    return lambda m, k: F.cross_entropy(logits(m(like(m, x[k]))), CLASSES[k])


def logits(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


def named(text: str) -> Callable[..., Any]:
    """transformers' class by its name, without an import before it is wanted."""

    import transformers

    transformers.logging.set_verbosity_error()
    return getattr(transformers, text)


def language(model: str, config: str, **options: Any) -> Zoo:
    """A language model: the loss is that of the next tokens."""

    def build() -> nn.Module:
        return named(model)(named(config)(vocab_size=50, **options))

    def loss(m: nn.Module, k: Any) -> torch.Tensor:
        return m(input_ids=TEXT[k], labels=TEXT[k]).loss

    return Zoo(build, loss, ("transformers",))


def experts(model: str, config: str, **options: Any) -> Zoo:
    """A language model whose experts are called one after the other: torch has no grouped product in float64."""
    found = language(model, config, **options)

    def build() -> nn.Module:
        return named(model)._from_config(named(config)(vocab_size=50, **options), experts_implementation="eager")

    return found._replace(build=build, alone=False)


def classifier(model: str, config: str, share: float = 0.95, **options: Any) -> Zoo:
    def build() -> nn.Module:
        return named(model)(named(config)(vocab_size=50, num_labels=3, **options))

    def loss(m: nn.Module, k: Any) -> torch.Tensor:
        return F.cross_entropy(m(input_ids=TEXT[k]).logits, CLASSES[k])

    return Zoo(build, loss, ("transformers",), share)


def translation(model: str, config: str, share: float = 0.95, **options: Any) -> Zoo:
    def build() -> nn.Module:
        return named(model)(named(config)(vocab_size=50, **options))

    def loss(m: nn.Module, k: Any) -> torch.Tensor:
        return m(input_ids=TEXT[k], labels=TEXT[k].flip(1)).loss

    return Zoo(build, loss, ("transformers",), share)


def picture(model: str, config: str, share: float = 0.95, size: int = 32, **options: Any) -> Zoo:
    def build() -> nn.Module:
        return named(model)(named(config)(num_labels=3, **options))

    return Zoo(build, classified(3, size, size), ("transformers",), share)


def timm(name: str, share: float = 0.95, size: int = 32, alone: bool = True, **options: Any) -> Zoo:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=3, **options)

    return Zoo(build, classified(3, size, size), ("timm",), share, alone)


def vision(name: str, share: float = 0.95, size: int = 32, **options: Any) -> Zoo:
    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(**{"num_classes": 3, **options})

    return Zoo(build, classified(3, size, size), ("torchvision",), share)


# --- torch's own ---


class Over(nn.Module):
    """A head over the mean over places of what a network of sequences gives."""

    def __init__(self, inner: nn.Module, width: int = 8):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(x)
        out = out[0] if isinstance(out, tuple) else out
        return self.head(torch.tanh(out).mean(1))


class Attended(nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, torch.tanh(x), x * x)[0]


class BothWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x.flip(1))


class Autoencoder(nn.Module):
    """A decoder with the transpose of the encoder's weight, and a score over what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(8, 5), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(torch.tanh(self.inner(x)) @ self.inner.weight).mean(1))


def upsampler() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.GELU(), nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.Tanh()),
        *(nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        nn.Linear(16, 3),
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50)
        self.head.weight = self.table.weight
        nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(self.table(tokens))))


TORCH: dict[str, Zoo] = {
    "nn.TransformerEncoder": Zoo(
        lambda: Over(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)),
        classified(5, 8),
    ),
    "nn.Transformer": Zoo(lambda: Over(BothWays()), classified(5, 8)),
    "nn.MultiheadAttention": Zoo(lambda: Over(Attended()), classified(5, 8)),
    "nn.MultiheadAttention, kdim": Zoo(lambda: Over(Attended(kdim=8, vdim=8, bias=False)), classified(5, 8)),
    "autoencoder, tied": Zoo(Autoencoder, classified(4, 8)),
    "tokens, tied": Zoo(Tied, lambda m, k: F.cross_entropy(m(TEXT[k]).flatten(0, 1), TEXT[k].flatten())),
    "upsampler": Zoo(upsampler, classified(3, 8, 8)),
    "nn.LSTM": Zoo(lambda: Over(nn.LSTM(8, 8, 2, batch_first=True)), classified(5, 8)),
    "nn.GRU": Zoo(lambda: Over(nn.GRU(8, 4, batch_first=True, bidirectional=True)), classified(5, 8)),
}

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
LLAMA = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0}
BERT = {**SMALL, "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 16,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
VIT = {**SMALL, "image_size": 32, "patch_size": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def whisper() -> Zoo:
    mel = noise(N, 8, 16)

    def build() -> nn.Module:
        return named("WhisperForConditionalGeneration")(
            named("WhisperConfig")(
                vocab_size=50,
                num_mel_bins=8,
                max_source_positions=8,
                max_target_positions=16,
                **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
            )
        )

    def loss(m: nn.Module, k: Any) -> torch.Tensor:
        return m(input_features=like(m, mel[k]), labels=TEXT[k]).loss

    return Zoo(build, loss, ("transformers",))


def clip() -> Zoo:
    x = noise(N, 3, 32, 32)

    def build() -> nn.Module:
        return named("CLIPForImageClassification")(
            named("CLIPConfig")(vision_config={**SMALL, "image_size": 32, "patch_size": 8}, num_labels=3)
        )

    return Zoo(build, lambda m, k: F.cross_entropy(m(like(m, x[k])).logits, CLASSES[k]), ("transformers",), 0.9)


TRANSFORMERS: dict[str, Zoo] = {
    "GPT-2": language(
        "GPT2LMHeadModel",
        "GPT2Config",
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "OPT": language(
        "OPTForCausalLM",
        "OPTConfig",
        ffn_dim=32,
        hidden_size=16,
        num_hidden_layers=2,
        word_embed_proj_dim=16,
        num_attention_heads=2,
        max_position_embeddings=32,
        dropout=0.0,
        pad_token_id=0,
    ),
    "GPT-NeoX": language("GPTNeoXForCausalLM", "GPTNeoXConfig", **SMALL, max_position_embeddings=32),
    "Bloom": language("BloomForCausalLM", "BloomConfig", hidden_size=16, n_layer=2, n_head=2),
    "Llama": language("LlamaForCausalLM", "LlamaConfig", **LLAMA),
    "Llama, tied": language("LlamaForCausalLM", "LlamaConfig", **LLAMA, tie_word_embeddings=True),
    "Mistral": language("MistralForCausalLM", "MistralConfig", **LLAMA),
    "Qwen2": language("Qwen2ForCausalLM", "Qwen2Config", **LLAMA),
    "Qwen3": language("Qwen3ForCausalLM", "Qwen3Config", **LLAMA, head_dim=8),
    "Gemma": language("GemmaForCausalLM", "GemmaConfig", **LLAMA, head_dim=8),
    "Phi": language("PhiForCausalLM", "PhiConfig", **{**LLAMA, "num_key_value_heads": 2}, resid_pdrop=0.0),
    "Mixtral": experts("MixtralForCausalLM", "MixtralConfig", **LLAMA, num_local_experts=4),
    "Qwen3-MoE": experts(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        **LLAMA,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
    "Mamba": language("MambaForCausalLM", "MambaConfig", hidden_size=16, num_hidden_layers=2, state_size=4),
    "BERT": classifier("BertForSequenceClassification", "BertConfig", **BERT),
    "BERT, masked": language("BertForMaskedLM", "BertConfig", **BERT),
    "RoBERTa": classifier("RobertaForSequenceClassification", "RobertaConfig", **BERT, classifier_dropout=0.0),
    "DistilBERT": classifier(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=32,
        max_position_embeddings=16,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
    ),
    "ELECTRA": classifier(
        "ElectraForSequenceClassification", "ElectraConfig", **BERT, embedding_size=16, classifier_dropout=0.0
    ),
    "ALBERT": classifier(
        "AlbertForSequenceClassification", "AlbertConfig", **BERT, embedding_size=8, classifier_dropout_prob=0.0
    ),
    "BART": translation("BartForConditionalGeneration", "BartConfig", **BART),
    "T5": translation(
        "T5ForConditionalGeneration",
        "T5Config",
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    ),
    "Blenderbot": translation("BlenderbotForConditionalGeneration", "BlenderbotConfig", **BART),
    "Whisper": whisper(),
    "ViT": picture("ViTForImageClassification", "ViTConfig", **VIT),
    "BEiT": picture("BeitForImageClassification", "BeitConfig", **VIT, drop_path_rate=0.0),
    "DINOv2": picture("Dinov2ForImageClassification", "Dinov2Config", **VIT),
    "Swin": picture(
        "SwinForImageClassification",
        "SwinConfig",
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
        image_size=32,
        patch_size=2,
        drop_path_rate=0.0,
    ),
    "ConvNeXt": picture(
        "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2
    ),
    "SegFormer": picture(
        "SegformerForImageClassification",
        "SegformerConfig",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[2, 2],
        num_attention_heads=[1, 2],
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
        decoder_hidden_size=16,
    ),
    "CLIP": clip(),
}

TIMM: dict[str, Zoo] = {
    "timm ViT": timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2),
    "timm Swin": timm(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 2),
        window_size=4,
        drop_path_rate=0.0,
    ),
    "timm BEiT": timm("beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2),
    "timm ConvNeXt": timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "timm EfficientNet": timm("test_efficientnet"),
    "timm EfficientNet, evolved": timm("test_efficientnet_evos"),
    "timm ResNet": timm("test_resnet"),
    "timm NFNet": timm("test_nfnet", share=0.0),
    "timm MobileNetV3": timm("mobilenetv3_small_050", drop_rate=0.0),
    "timm MambaOut": timm("test_mambaout"),
    "timm ByobNet": timm("test_byobnet"),
}

VISION: dict[str, Zoo] = {
    "torchvision ViT": Zoo(
        lambda: importlib.import_module("torchvision").models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3),
        classified(3, 32, 32),
        ("torchvision",),
    ),
    "torchvision Swin": Zoo(
        lambda: importlib.import_module("torchvision").models.SwinTransformer(
            [2, 2], 16, [1, 1], [2, 2], [4, 4], num_classes=3, stochastic_depth_prob=0.0
        ),
        classified(3, 32, 32),
        ("torchvision",),
    ),
    "torchvision Swin V2": Zoo(
        lambda: importlib.import_module("torchvision").models.SwinTransformer(
            *([2, 2], 16, [1, 1], [2, 2], [4, 4]),
            num_classes=3,
            stochastic_depth_prob=0.0,
            block=importlib.import_module("torchvision").models.swin_transformer.SwinTransformerBlockV2,
            downsample_layer=importlib.import_module("torchvision").models.swin_transformer.PatchMergingV2,
        ),
        classified(3, 32, 32),
        ("torchvision",),
    ),
    "torchvision ShuffleNet": vision("shufflenet_v2_x0_5"),
    "torchvision ConvNeXt": Zoo(
        lambda: importlib.import_module("torchvision").models.ConvNeXt(
            [
                importlib.import_module("torchvision").models.convnext.CNBlockConfig(8, 16, 1),
                importlib.import_module("torchvision").models.convnext.CNBlockConfig(16, None, 1),
            ],
            num_classes=3,
        ),
        classified(3, 32, 32),
        ("torchvision",),
    ),
    "torchvision SqueezeNet": vision("squeezenet1_1", dropout=0.0),
}


def adapted(**options: Any) -> Zoo:
    """Llama with an adapter of PEFT; only the adapter trains."""
    kind = options.pop("kind")

    def build() -> nn.Module:
        import peft

        model = TRANSFORMERS["Llama"].build()
        made = getattr(peft, kind)(**options)
        model = peft.get_peft_model(model, made)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "vera_lambda_b" in name:  # begins at zero, where the other half has no gradient
                parameter.data.normal_(generator=torch.Generator().manual_seed(3)).mul_(0.1)
        return model

    return Zoo(build, TRANSFORMERS["Llama"].loss, ("transformers", "peft"))


PEFT: dict[str, Zoo] = {
    "LoRA": adapted(kind="LoraConfig", r=2, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0),
    "LoRA, embeddings": adapted(kind="LoraConfig", r=2, target_modules=["embed_tokens", "q_proj"]),
    "DoRA": adapted(kind="LoraConfig", use_dora=True, r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.0),
    "VeRA": adapted(
        kind="VeraConfig", r=4, target_modules=["q_proj", "v_proj"], vera_dropout=0.0, save_projection=False
    ),
    "IA3": adapted(
        kind="IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}

ALL: dict[str, Zoo] = {**TORCH, **TRANSFORMERS, **TIMM, **VISION, **PEFT}
