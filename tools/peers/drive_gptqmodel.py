"""GPTQModel 7.4.0 from the command line, on a CPU; see drive.py for the commands.

Release 7.4.0 imports torchvision, which it does not list as a requirement, for one family of image
models. If torchvision is missing, empty modules replace it while the library is imported; nothing
here uses the code that needs it.
"""

import importlib.machinery
import importlib.util
import os
import sys
import time
import types

import drive
import torch

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(len(os.sched_getaffinity(0))))


def import_library():
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    if importlib.util.find_spec(names[0]):
        import gptqmodel

        return gptqmodel
    from transformers.utils import is_torchvision_available

    is_torchvision_available()  # caches the right answer before the empty modules exist
    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    sys.modules[names[-1]].InterpolationMode = None
    import gptqmodel

    for name in names:
        del sys.modules[name]
    return gptqmodel


gptqmodel = import_library()


def settings(arguments):
    """Plain GPTQ with the given options, for comparison; or the library's defaults."""
    if arguments.command == "quantize" and arguments.defaults:
        return gptqmodel.QuantizeConfig(
            bits=arguments.bits, group_size=arguments.group_size, device="cpu"
        )
    return gptqmodel.QuantizeConfig(
        bits=arguments.bits,
        group_size=arguments.group_size,
        sym=arguments.symmetric,
        desc_act=arguments.act_order,
        static_groups=arguments.static_groups,
        act_group_aware=False,  # the library's own reordering of columns and groups
        damp_percent=arguments.damp,
        device="cpu",
    )


@torch.inference_mode()
def solve(arguments):
    from gptqmodel.quantization.gptq import GPTQ

    layer, inputs = drive.read_problem(arguments.input)
    weight = layer.weight.data.clone()
    solver = GPTQ(layer, settings(arguments))
    solver.quantizer.configure(perchannel=True)
    solver.add_batch(inputs[None], None)
    start = time.perf_counter()
    solved, scale, zero, g_idx, _, _, damp, _ = solver.quantize()
    seconds = time.perf_counter() - start
    summary = drive.write_solution(
        arguments.output, weight, inputs, solved, scale, zero, g_idx, seconds
    )
    return summary | {"damp": float(damp)}


def quantize(arguments):
    examples = [
        {"input_ids": row, "attention_mask": torch.ones_like(row)}
        for row in drive.read_tokens(arguments.tokens)
    ]
    config = settings(arguments)
    model = gptqmodel.GPTQModel.load(str(arguments.model), config, dtype=torch.float32)
    clock = drive.Clock()
    model.quantize(examples, batch_size=1)
    summary = clock.read()
    model.save(str(arguments.output))
    return summary | {"options": config.to_dict()}


def logits(arguments):
    tokens = drive.read_tokens(arguments.tokens)
    if arguments.through_transformers:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            arguments.checkpoint, dtype=torch.float32, device_map="cpu"
        )
    else:
        # its plain kernel refuses float32 when it loads, but computes in it after a cast
        model = gptqmodel.GPTQModel.load(
            str(arguments.checkpoint), device="cpu", dtype=torch.float16
        ).model.float()
    drive.write_logits(arguments.output, model.eval(), tokens)
    return {"kernel": drive.linear_kind(model)}


if __name__ == "__main__":
    drive.main(solve, quantize, logits, ("gptqmodel",))
