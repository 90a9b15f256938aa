"""Time of a training step of the recurrent layers beside torch's: python scripts/recurrent_speed.py [steps]."""

import sys
import time

import torch

import normscope as ns

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 50
BATCH, FEATURES, HIDDEN = 32, 64, 128


def seconds(net: torch.nn.Module, x: torch.Tensor, gy: torch.Tensor) -> float:
    start = time.process_time()  # others may use the machine
    net(x)[0].backward(gy)
    return time.process_time() - start


def main() -> None:
    nets = {
        "torch.nn.LSTM": torch.nn.LSTM(FEATURES, HIDDEN),
        "LayerNormLSTM": ns.nn.LayerNormLSTM(FEATURES, HIDDEN),
        "BatchNormLSTM": ns.nn.BatchNormLSTM(FEATURES, HIDDEN, max_length=STEPS),
        "torch.nn.GRU": torch.nn.GRU(FEATURES, HIDDEN),
        "LayerNormGRU": ns.nn.LayerNormGRU(FEATURES, HIDDEN),
    }
    x, gy = torch.randn(STEPS, BATCH, FEATURES), torch.randn(STEPS, BATCH, HIDDEN)
    best = dict.fromkeys(nets, float("inf"))
    for _ in range(12):  # in turns, so that the machine's other work falls on all alike
        for name, net in nets.items():
            best[name] = min(best[name], seconds(net, x, gy))
    print(f"{STEPS} steps, batch {BATCH}, {FEATURES} → {HIDDEN}, {torch.get_num_threads()} threads, forward + backward")
    for name, time_ in best.items():
        peer = best["torch.nn.GRU" if name.endswith("GRU") else "torch.nn.LSTM"]
        print(f"{name:14} {time_ * 1e3:7.1f} ms  {time_ / peer:4.1f} × torch's")


main()
