"""What a run may leave behind on a model that others share."""
import torch


def state_of(model):
    """Everything on the shared modules that a run might leave something on."""
    modules = {}
    for name, module in model.model.named_modules():
        hooks = [len(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")]
        modules[name] = (sorted(vars(module)), hooks, module.training, getattr(module, "comfy_cast_weights", None))
    flags = {name: (p.requires_grad, p.grad is None, p.is_inference(), p.data_ptr()) for name, p in model.model.named_parameters()}
    return modules, flags, {name: value.clone() for name, value in model.model.state_dict().items()}


def same_state(before, after):
    return before[:2] == after[:2] and before[2].keys() == after[2].keys() and all(torch.equal(before[2][name], after[2][name]) for name in before[2])
