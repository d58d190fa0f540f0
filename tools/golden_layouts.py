"""Golden checkpoints of defend-vit: small random models as timm, transformers and DINO's own code save them.

Usage: python tools/golden_layouts.py   (needs torch, timm, transformers, safetensors)
Writes crates/defend-vit/tests/golden/layouts/<name>/ (config.json, weights as the library names them) and
crates/defend-vit/tests/golden/layouts.safetensors with what the libraries compute. No parameter is 0 or 1.

All models: image 16, patch 4, width 24, depth 2, 3 heads, MLP width 48; `dino` has one head (a bare .pth file tells
nothing of heads, which are of 64 channels in all of that family).

  images [2,3,16,16], large_images [1,3,24,24]    inputs, normalised already
  <name>.patches [2,16,24], <name>.cls [2,24]     after the final norm
  <name>.cls_attention [2,h,16]    last block; CLS, distillation and register columns dropped
  <name>.logits [2,5]              where the model has heads for its CLS (and distillation) token
  hf_dinov2.large_patches, hf_dinov2_plain.large_patches [1,36,24]    on large_images: bicubic positional embedding,
                                   antialiased with registers and plain without

views/views.pth holds two views of one storage 0, 1, ..., 11: `rows` [2,3] from 4 on, `turned` [3,2], the transpose of
[2,3] from 6 on. views/archive.pt, legacy.pt (the stream of before PyTorch 1.6) and protocol4.pt hold both and a vector of
each type.
"""

import json
import shutil

import torch
from golden import ROOT, write
from golden_vit import run
from safetensors.torch import load_file, save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from transformers import Dinov2Config, Dinov2Model
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
from transformers import ViTConfig, ViTForImageClassification

FOLDER = ROOT / "crates/defend-vit/tests/golden/layouts"
TIMM = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2)
HF = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=4)
CLASSES = 5


def randomised(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma", "lambda1"))
            offset = 1.0 if scale or "layernorm" in name and name.endswith("weight") else 0.0
            p.copy_(offset + 0.3 * torch.randn_like(p))
    return model.eval()


def folder(name):
    path = FOLDER / name
    path.mkdir(parents=True)
    return path


def timm_config(path, architecture, classes):
    pretrained = {"tag": "test", "input_size": [3, 16, 16], "interpolation": "bicubic"}
    pretrained |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    config = {"architecture": architecture, "num_classes": classes, "model_args": {"num_heads": 3}}
    (path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": pretrained}, indent=1) + "\n")


def hf_preprocessor(path):
    values = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 2, "do_resize": True}
    (path / "preprocessor_config.json").write_text(json.dumps(values) + "\n")


def timm_outputs(model, images, extra):
    seen = {}
    hook = model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.update(tokens=inputs[0]))
    final = model.forward_features(images)
    hook.remove()
    _, _, attention = run(model, seen["tokens"])
    out = {"patches": final[:, 1 + extra :], "cls": final[:, 0], "cls_attention": attention[-1][..., extra:]}
    return out | ({"logits": model(images)} if model.num_classes else {})


def hf_outputs(model, images, extra):
    base = getattr(model, model.base_model_prefix, model)
    found = base(images, output_attentions=True)
    final = found.last_hidden_state
    attention = found.attentions[-1][:, :, 0, 1 + extra :]
    out = {"patches": final[:, 1 + extra :], "cls": final[:, 0], "cls_attention": attention}
    return out | ({"logits": model(images).logits} if base is not model else {})


@torch.no_grad()
def main():
    torch.manual_seed(0)
    shutil.rmtree(FOLDER, ignore_errors=True)
    images, large = torch.randn(2, 3, 16, 16), torch.randn(1, 3, 24, 24)
    out = {"images": images, "large_images": large}

    def add(name, outputs):
        out.update({f"{name}.{key}": value for key, value in outputs.items()})

    def add_timm(name, model, architecture, extra):
        path = folder(name)
        timm_config(path, architecture, model.num_classes)
        save_file(randomised(model).state_dict(), path / "model.safetensors")
        add(name, timm_outputs(model, images, extra))

    def add_hf(name, model, extra):
        path = folder(name)
        randomised(model).save_pretrained(path)
        hf_preprocessor(path)
        add(name, hf_outputs(model, images, extra))
        return path

    deit = VisionTransformerDistilled(**TIMM, num_classes=CLASSES)
    add_timm("timm_deit_distilled", deit, "deit_test_distilled_patch4_16", 1)
    dinov2 = VisionTransformer(**TIMM, num_classes=0, reg_tokens=3, no_embed_class=True, init_values=1e-5)
    add_timm("timm_dinov2_reg", dinov2, "vit_test_patch4_reg3_dinov2", 3)

    hf = HF | {"attn_implementation": "eager"}
    classifier = hf | {"intermediate_size": 48, "num_labels": CLASSES}
    add_hf("hf_vit", ViTForImageClassification(ViTConfig(**classifier)), 0)
    add_hf("hf_deit", DeiTForImageClassificationWithTeacher(DeiTConfig(**classifier)), 1)
    dinov2 = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**hf, mlp_ratio=2, num_register_tokens=3))
    path = add_hf("hf_dinov2", dinov2, 3)
    # The names on disk are not those in memory.
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    add("hf_dinov2", {"large_patches": dinov2(large).last_hidden_state[:, 4:]})

    # A training checkpoint of DINO: two networks behind DataParallel's names, each with its projection.
    dino = randomised(VisionTransformer(**TIMM | {"num_heads": 1}, num_classes=0))
    state = {f"module.backbone.{k}": v for k, v in dino.state_dict().items()}
    teacher = state | {"module.head.mlp.0.weight": torch.randn(4, 24), "module.head.last_layer.weight_g": torch.ones(4, 1)}
    student = {k: torch.zeros(1) for k in teacher}
    torch.save({"student": student, "teacher": teacher, "epoch": 3}, folder("dino") / "checkpoint.pth")
    add("dino", timm_outputs(dino, images, 0))

    plain = Dinov2Model(Dinov2Config(**hf, mlp_ratio=2))
    add_hf("hf_dinov2_plain", plain, 0)
    add("hf_dinov2_plain", {"large_patches": plain(large).last_hidden_state[:, 1:]})

    shared = torch.arange(12.0)
    views = {"rows": shared[4:10].view(2, 3), "turned": shared[6:].view(2, 3).t()}
    torch.save(views, folder("views") / "views.pth")

    # Both ways to store a file, with what may be in one: other types, a parameter, integers that are no weights.
    mixed = views | {"half": shared[:3].half(), "bfloat": shared[:3].bfloat16(), "double": shared[:3].double()}
    mixed |= {"parameter": torch.nn.Parameter(shared[:2].clone()), "steps": torch.arange(3)}
    torch.save({"state_dict": mixed, "epoch": 3, "rate": 0.1}, FOLDER / "views/archive.pt")
    torch.save({"state_dict": mixed, "epoch": 3, "rate": 0.1}, FOLDER / "views/legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": mixed}, FOLDER / "views/protocol4.pt", pickle_protocol=4)

    deit3 = VisionTransformer(**TIMM, num_classes=0, no_embed_class=True, init_values=1e-5)
    add_timm("timm_deit3", deit3, "deit3_test_patch4_16", 0)
    registers = VisionTransformer(**TIMM, num_classes=0, reg_tokens=2)
    add_timm("timm_reg_positions", registers, "vit_test_patch4_reg2_16", 2)

    for file in FOLDER.glob("*/*"):
        file.chmod(0o644)
    write("defend-vit", "layouts", out)


if __name__ == "__main__":
    main()
