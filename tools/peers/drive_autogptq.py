"""AutoGPTQ 0.7.1 from the command line, on a CPU; see drive.py for the commands.

The library expects a GPU. It runs on a CPU, with its arithmetic unchanged, after two changes: the
device that it calls CUDA_0 is the CPU, and waiting for the GPU does nothing. `from_pretrained`
refuses to run without CUDA, so transformers loads the model, which is passed to the class that
`from_pretrained` would have used.
"""

import time

import auto_gptq.modeling._base as base
import drive
import torch
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.modeling.llama import LlamaGPTQForCausalLM
from auto_gptq.quantization.gptq import GPTQ
from transformers import AutoModelForCausalLM

if not torch.cuda.is_available():
    base.CUDA_0 = torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None


@torch.inference_mode()
def solve(arguments):
    layer, inputs = drive.read_problem(arguments.input)
    weight = layer.weight.data.clone()
    solver = GPTQ(layer)
    solver.quantizer.configure(arguments.bits, perchannel=True, sym=arguments.symmetric, mse=False)
    solver.add_batch(inputs, None)
    start = time.perf_counter()
    scale, zero, g_idx = solver.fasterquant(
        percdamp=arguments.damp,
        group_size=arguments.group_size,
        actorder=arguments.act_order,
        static_groups=arguments.static_groups,
    )
    seconds = time.perf_counter() - start
    return drive.write_solution(
        arguments.output, weight, inputs, layer.weight.data, scale, zero, g_idx, seconds
    )


def quantize(arguments):
    """The book chapter's code, with examples for `quantize` and without CUDA."""
    examples = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
        for row in drive.read_tokens(arguments.tokens)
    ]
    options = {
        "desc_act": arguments.act_order,
        "static_groups": arguments.static_groups,
        "sym": arguments.symmetric,
        "damp_percent": arguments.damp,
    }
    quantize_config = BaseQuantizeConfig(
        bits=arguments.bits,
        group_size=arguments.group_size,
        **({} if arguments.defaults else options),
    )
    with drive.readable_by_old_transformers(arguments.model) as folder:
        plain = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    clock = drive.Clock()
    model = LlamaGPTQForCausalLM(plain, False, quantize_config)
    model.quantize(examples)
    summary = clock.read()
    model.save_quantized(str(arguments.output))
    return summary | {"options": quantize_config.to_dict()}


def logits(arguments):
    tokens = drive.read_tokens(arguments.tokens)
    if arguments.through_transformers:
        raise SystemExit("transformers 4 needs optimum and a GPU here: use GPTQModel's driver")
    with drive.readable_by_old_transformers(arguments.checkpoint) as folder:
        model = AutoGPTQForCausalLM.from_quantized(
            str(folder), device="cpu", torch_dtype=torch.float32, use_safetensors=True
        ).model
    drive.write_logits(arguments.output, model.eval(), tokens)
    return {"kernel": drive.linear_kind(model)}


if __name__ == "__main__":
    drive.main(solve, quantize, logits, ("auto-gptq",))
