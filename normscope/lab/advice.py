"""Which normalizer for which situation: every sentence with the question of an experiment that it rests on.

The sentences are written for either verdict, so that the page says what was measured and cannot say anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from normscope.errors import ArgumentError
from normscope.records import Advice, Experiment, LabVerdict, Point

__all__ = ["SITUATIONS", "advice"]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question of an experiment, and the clause that follows from either answer.

    Attributes:
        supports: The answer that speaks for the advice, as CONDITIONAL does; None where neither does.
        mixed: The clause of CONDITIONAL.
    """

    experiment: str
    question: str
    yes: str
    no: str
    supports: LabVerdict | None = "CONFIRMED"
    mixed: str = ""


@dataclass(frozen=True, slots=True)
class _Situation:
    title: str
    use: str
    call: tuple[str, ...]
    cost: str
    published: str
    asked: tuple[_Asked, ...]


SITUATIONS = (
    _Situation(
        "Convolutions, batches of 16 images and more",
        "Keep Batch Normalization, drop the bias of the convolution in front of it, and raise the learning rate. "
        "`accelerate` puts fused layers of the same numbers into the model.",
        ("report = ns.accelerate(network(), images)",),
        "A pass over the activations more in training; none in inference, where it folds into the convolution.",
        "ResNet-50 on ImageNet, error with 32 images per device: Batch Normalization 23.6 %, GroupNorm 24.1, LayerNorm "
        "25.3, InstanceNorm 28.4 (WH18).",
        (
            _Asked(
                "B03", "does it train at larger rates?",
                "with Batch Normalization the largest rate that trains is at least three times as large",
                "with Batch Normalization the largest rate that trains is no larger",
            ),
            _Asked(
                "B03", "does it need fewer steps?",
                "at each network's own best rate fewer steps reach the accuracy of the network without",
                "at each network's own best rate it saves no steps",
            ),
            _Asked(
                "H01", "does it make convolutional networks generalise better?",
                "a convolutional network ends at a higher test accuracy with it than without",
                "a convolutional network ends no higher with it than without",
            ),
            _Asked(
                "H01", "convolutions: is BN among the best?",
                "in convolutions no other normalizer is surely better",
                "in convolutions another normalizer is surely better",
            ),
            _Asked(
                "B04", "do more initial scales work?",
                "it trains from more initial scales of the weights",
                "it trains from no more initial scales of the weights",
            ),
            _Asked(
                "B05", "do more settings work?",
                "more settings drawn at random work with it than without",
                "no more settings drawn at random work with it than without",
            ),
            _Asked(
                "G01", "is it more vulnerable?",
                "attacks with gradients fool it more than the network without",
                "attacks with gradients fool it no more than the network without",
                supports="REFUTED",
            ),
            _Asked(
                "A06", "is it redundant?",
                "the bias in front of it does nothing",
                "the bias in front of it matters",
                supports="EXACT",
            ),
            _Asked(
                "B08", "is it better after?",
                "it is better behind the activation than in front of it",
                "it is better in front of the activation than behind it",
                supports="REFUTED",
            ),
            _Asked(
                "B07", "is sigmoid better than ReLU with it?",
                "with it sigmoid does better than ReLU",
                "with it ReLU still does better than sigmoid",
                supports="REFUTED",
            ),
        ),
    ),
    _Situation(
        "Four images or fewer per device",
        "Train with GroupNorm, and try Online Normalization beside it; over several devices, share the statistics.",
        (
            'report = ns.convert(network(), {"BatchNorm": "GroupNorm(32)"}, calibrate=loader)',
            'report = ns.convert(network(), {"BatchNorm": "OnlineNorm"})',
            "report = ns.synchronize(network())  # in a process group",
        ),
        "GroupNorm and Online Normalization compute their statistics in inference too, and do not fold; synchronised "
        "statistics wait for the slowest device twice in every layer and step.",
        "ResNet-50 on ImageNet, error with 2 images per device: Batch Normalization 34.7 %, GroupNorm 24.1 (WH18).",
        (
            _Asked(
                "C01", "does it lose with a small statistics batch?",
                "Batch Normalization loses as fewer images share statistics, the optimizer's batch being the same",
                "Batch Normalization does not lose as fewer images share statistics",
            ),
            _Asked(
                "C02", "does the error rise as the batch shrinks?",
                "its error rises as statistics and optimizer's batch shrink together",
                "its error does not rise as statistics and optimizer's batch shrink together",
            ),
            _Asked(
                "C02", "more than with GroupNorm?",
                "its error rises faster than GroupNorm's",
                "its error rises no faster than GroupNorm's",
                supports=None,
            ),
            _Asked(
                "C01", "GroupNorm where statistics have 2 images?",
                "GroupNorm is better than Batch Normalization over two images",
                "GroupNorm is worse than Batch Normalization over two images",
            ),
            _Asked(
                "H01", "is GroupNorm better where statistics have two samples?",
                "in the matrix, too, GroupNorm is better than Batch Normalization over two images",
                "in the matrix GroupNorm is worse than Batch Normalization over two images",
            ),
            _Asked(
                "C01", "is GroupNorm among the best that need no large batch?",
                "of what needs no large batch nothing is surely better than GroupNorm",
                "Online Normalization or Batch Renormalization is surely better than GroupNorm",
            ),
            _Asked(
                "C07", "is a number of groups between better than both ends?",
                "groups between one and one per channel beat LayerNorm and InstanceNorm",
                "LayerNorm or InstanceNorm, the ends of GroupNorm, is surely better",
            ),
            _Asked(
                "C03", "do synchronised statistics repair it?",
                "synchronised statistics restore what one large device reaches",
                "synchronised statistics do not restore what one large device reaches",
            ),
            _Asked(
                "A10", "is a batch of 1 impossible?",
                "a batch of one is impossible",
                "a batch of one works",
                supports=None,
                mixed="a batch of one carries no signal through a linear layer; in a convolution it is InstanceNorm",
            ),
        ),
    ),
    _Situation(
        "Fine-tuning a pretrained network with tiny batches, as for detection",
        "Freeze the pretrained statistics, through `train()` too.",
        ("report = ns.freeze(network())",),
        "Nothing: a frozen layer is one multiplication and addition, and keeps no statistics for the backward pass.",
        "Mask R-CNN on COCO, box AP: frozen Batch Normalization 37.7, GroupNorm 38.6, which needs a network pretrained "
        "with it (WH18).",
        (
            _Asked(
                "C06", "does it lose in fine-tuning with batches of 2?",
                "layers that go on updating lose against frozen ones or GroupNorm at batches of two",
                "layers that go on updating lose nothing at batches of two",
            ),
            _Asked(
                "C06", "more than with batches of 32?",
                "they lose more than with batches of 32",
                "they lose no more than with batches of 32",
                supports=None,
            ),
        ),
    ),
    _Situation(
        "Recurrent networks",
        "LayerNorm in the cell, or no normalizer; no batch statistics from step to step.",
        ("states, last = ns.nn.LayerNormLSTM(28, 64, batch_first=True)(torch.randn(8, 28, 28))",),
        "A mean and a variance per step and gate block.",
        "Permuted MNIST with an LSTM of 100 units and 100 000 steps: 90.2 % without, 95.4 % with recurrent Batch "
        "Normalization and γ₀ = 0.1 (CO16); our runs are of 400 steps.",
        (
            _Asked(
                "E01", "tanh: is LayerNorm the best normalizer here?",
                "in a tanh network LayerNorm surely beats every other normalizer",
                "in a tanh network another normalizer surely beats LayerNorm",
            ),
            _Asked(
                "E01", "LSTM: is LayerNorm the best normalizer here?",
                "in an LSTM LayerNorm surely beats Batch Normalization",
                "in an LSTM Batch Normalization surely beats LayerNorm",
            ),
            _Asked(
                "E01", "tanh: is it of no use?",
                "batch statistics of every step are of no use in a tanh network",
                "batch statistics of every step are of use in a tanh network",
            ),
            _Asked(
                "E01", "LSTM: is it of no use?",
                "batch statistics of every step are of no use in an LSTM",
                "batch statistics of every step are of use in an LSTM",
            ),
            _Asked(
                "E01", "tanh: does it explode horizontally?",
                "with them gradients grow towards the past, violently where inputs are equal across the batch",
                "with them gradients do not grow towards the past",
                mixed="with them gradients grow towards the past where inputs are equal across the batch",
            ),
            _Asked(
                "H01", "recurrent: is LN among the best?",
                "on the matrix's recurrent task nothing surely beats LayerNorm",
                "on the matrix's recurrent task another is surely better than LayerNorm",
            ),
        ),
    ),
    _Situation(
        "Sequences of unequal length",
        "Mask the padding wherever statistics go over time or the batch; LayerNorm per step needs no mask.",
        (
            "kept = torch.arange(9) < torch.tensor([[9], [4]])",
            "y = ns.nn.BatchNorm1d(16)(torch.randn(2, 16, 9), mask=kept)",
        ),
        "One more read, of the mask.",
        "Padding of zeros biases the statistics; those of the last step known serve the steps beyond it (CO16).",
        (
            _Asked(
                "E02", "does it fall behind LayerNorm on longer sequences?",
                "with statistics per step Batch Normalization falls behind LayerNorm as sequences get longer",
                "with statistics per step Batch Normalization does not fall behind LayerNorm on longer sequences",
            ),
            _Asked(
                "E02", "do the last step's statistics serve beyond the longest sequence?",
                "beyond the longest sequence of training the last step's statistics serve",
                "beyond the longest sequence of training the last step's statistics do not serve",
                supports=None,
            ),
        ),
    ),
    _Situation(
        "Transformers, and sequences as sets of tokens",
        "LayerNorm or RMSNorm in front of attention and of the perceptron.",
        ("layer = ns.nn.RMSNorm(64)",),
        "A pass over the tokens; `ns.functional.add_norm` does it together with the residual addition.",
        "",
        (
            _Asked(
                "H01", "is LayerNorm useful in recurrent networks only?",
                "LayerNorm helps neither in a small transformer nor in convolutions",
                "LayerNorm helps outside recurrent networks: in a small transformer, or in convolutions",
                supports="REFUTED",
            ),
        ),
    ),
    _Situation(
        "Super-resolution",
        "No normalizer: build the network without. One that was trained with it loses it by folding, at no change.",
        (
            'report = ns.convert(network(), {"BatchNorm": lambda old: torch.nn.Identity()})  # and train again',
            "report = ns.fold(network().eval(), images)",
        ),
        "Less than nothing: the activations that a normalizer keeps for backward are saved.",
        "EDSR took it out of SRResNet: 34.55 dB against 34.44 on DIV2K, with 40 % less memory in training (ED17).",
        (
            _Asked(
                "F01", "is it worse for super-resolution?",
                "Batch Normalization costs PSNR against no normalizer, both tuned",
                "Batch Normalization costs no PSNR",
            ),
            _Asked(
                "F01", "is contrast lost?",
                "pictures lose contrast with it",
                "pictures do not lose contrast with it",
            ),
            _Asked(
                "F01", "is it the mixing of statistics?",
                "the loss is due to mixed statistics: running statistics in late training repair it",
                "the loss is not due to mixed statistics: running statistics in late training do not repair it",
                supports="REFUTED",
            ),
            _Asked(
                "F04", "does normalizing cost where contrast must be kept?",
                "any normalizer costs where an image's own contrast must come out",
                "normalizing costs nothing where an image's own contrast must come out",
            ),
        ),
    ),
    _Situation(
        "Denoising",
        "No normalizer in a small network; try Batch Normalization in a deep one that predicts the noise.",
        ('report = ns.convert(network(), {"BatchNorm": lambda old: torch.nn.Identity()})',),
        "As for super-resolution.",
        "DnCNN, 17 layers, predicts the noise and gains from Batch Normalization (DN17); our networks are of 3 blocks.",
        (
            _Asked(
                "F02", "does it help denoising?",
                "Batch Normalization helps to predict noise of one level",
                "Batch Normalization costs PSNR even for noise of one level",
                supports="REFUTED",
            ),
            _Asked(
                "F02", "does it suit denoising more than super-resolution?",
                "it suits denoising more than super-resolution",
                "it costs denoising more than super-resolution",
                supports=None,
            ),
            _Asked(
                "F03", "is the residual of denoising independent noise of one level?",
                "the noise to predict is independent and of one level, as the theory in its favour supposes",
                "the noise to predict is not independent and of one level",
                supports=None,
            ),
        ),
    ),
    _Situation(
        "Style transfer",
        "InstanceNorm, at test time too.",
        ('report = ns.convert(network(), {"BatchNorm": "InstanceNorm2d(affine=True)"}, calibrate=loader)',),
        "Statistics of every image in inference too; it does not fold.",
        "InstanceNorm in place of Batch Normalization, in qualitative comparisons (UL16).",
        (
            _Asked(
                "F05", "is InstanceNorm the best normalizer here?",
                "no other normalizer reaches InstanceNorm's loss",
                "another normalizer is surely better than InstanceNorm",
            ),
            _Asked(
                "F05", "is it of use in style transfer?",
                "Batch Normalization beats no normalizer",
                "Batch Normalization does not beat no normalizer",
                supports="REFUTED",
            ),
            _Asked(
                "F05", "does it suffer from mixing unrelated images in a batch?",
                "Batch Normalization suffers from unrelated images in one batch",
                "Batch Normalization does not suffer from unrelated images in one batch",
            ),
            _Asked(
                "A13", "does it remove an image's contrast?",
                "Batch Normalization removes an image's contrast",
                "what removes an image's contrast is InstanceNorm, not Batch Normalization",
                supports=None,
            ),
        ),
    ),
    _Situation(
        "Generative adversarial networks",
        "Batch Normalization or InstanceNorm in the generator, one tried against the other; spectral normalization in "
        "the discriminator.",
        (
            'report = ns.convert(network(), {"BatchNorm": "InstanceNorm2d(affine=True)"}, calibrate=loader)',
            "layer = ns.parametrizations.spectral_norm(torch.nn.Conv2d(3, 64, 3))",
        ),
        "Spectral normalization: a matrix-vector product per layer and step.",
        "DCGAN (Radford et al. 2016) needed Batch Normalization, though not in the generator's last nor the "
        "discriminator's first layer.",
        (
            _Asked(
                "F06", "is it worse in the generator?",
                "Batch Normalization in the generator is worse than no normalizer",
                "Batch Normalization in the generator is better than no normalizer",
                supports="REFUTED",
            ),
            _Asked(
                "F06", "is InstanceNorm the best normalizer of the generator?",
                "no other normalizer of the generator surely beats InstanceNorm",
                "another normalizer of the generator is surely better than InstanceNorm",
            ),
        ),
    ),
    _Situation(
        "Online learning, one sample at a time",
        "A normalizer of one sample (GroupNorm, LayerNorm), or Online Normalization, which remembers.",
        ('report = ns.convert(network(), {"BatchNorm": "OnlineNorm"})',),
        "Online Normalization is computed sample by sample within a batch, and does not fold while it learns.",
        "Online Normalization is as accurate as Batch Normalization, without batches (CH19).",
        (
            _Asked(
                "C04", "does it lose, one image at a time?",
                "on a stream of single images Batch Normalization stays behind the best of the others",
                "on a stream of single images Batch Normalization does not stay behind",
            ),
            _Asked(
                "C04", "does it lose more with varying batches than with fixed ones?",
                "it loses more with batches of varying size",
                "it loses no more with batches of varying size",
            ),
            _Asked(
                "C04", "is Online Normalization as good as Batch Normalization in batches of 16, or better?",
                "Online Normalization is as good as Batch Normalization even in batches of 16",
                "Online Normalization is worse than Batch Normalization in batches of 16",
            ),
        ),
    ),
    _Situation(
        "Test data from another distribution",
        "Measure the statistics of Batch Normalization again on unlabelled test data of all classes; `adapt` refuses "
        "where a mix of classes would make it lose. Where every image has a contrast of its own, InstanceNorm from the "
        "start.",
        ("report = ns.adapt(network().eval(), loader, guard=False)  # images of noise: leave guard= away with yours",),
        "Forward passes over test data, at the most 200 batches; no labels, no gradients.",
        "ResNet-50 on ImageNet-C: mean corruption error from 76.7 to 62.2 by the statistics of the test set (TTA).",
        (
            _Asked(
                "B17", "does it lose less where test images differ?",
                "with stored statistics Batch Normalization loses less by the shift than no normalizer",
                "with stored statistics Batch Normalization loses more by the shift than no normalizer",
                supports="REFUTED",
            ),
            _Asked(
                "B17", "do statistics of the test set help there?",
                "statistics of the test data win back what the shift took",
                "statistics of the test data do not help",
            ),
            _Asked(
                "B17", "does removing contrast help to see pale images?",
                "InstanceNorm sees pale images that the others do not",
                "InstanceNorm does not help with pale images",
            ),
            _Asked(
                "B17", "does it harm where contrast is the answer, more than where it is not?",
                "InstanceNorm fails where contrast itself is the answer",
                "InstanceNorm loses nothing where contrast itself is the answer",
                supports=None,
            ),
        ),
    ),
    _Situation(
        "Batches whose classes or domains differ",
        "Mix the batches; where that is impossible, statistics per domain, or GroupNorm.",
        ("report = ns.split_statistics(network(), 2)",),
        "A set of running statistics per domain.",
        "With two images per class in a batch, Batch Normalization loses what Batch Renormalization keeps (BRN).",
        (
            _Asked(
                "B16", "do unequal batches slow down learning?",
                "unequal batches slow learning down without a normalizer, too",
                "unequal batches do not slow learning down without a normalizer",
                supports=None,
            ),
            _Asked(
                "B16", "does Batch Normalization lose less by unequal batches?",
                "Batch Normalization loses less by them than no normalizer",
                "Batch Normalization loses more by them than no normalizer",
                supports="REFUTED",
            ),
        ),
    ),
    _Situation(
        "Serving one request at a time",
        "Stored statistics, never those of the request; measure them again when training ended at a large rate, then "
        "fold.",
        (
            "model = network()",
            "report = ns.recalibrate(model, loader)",
            "report = ns.fold(model.eval(), images)",
        ),
        "A forward pass over some thousand samples, once; folded, the normalizer costs nothing.",
        "Better statistics in evaluation alone regain 6.18 points at 2 images per device (EN19); some thousand samples "
        "do (WJ21).",
        (
            _Asked(
                "A04", "does a sample's output depend on it alone?",
                "with stored statistics a sample's output is the same, bit for bit, alone and in any batch",
                "with stored statistics a sample's output depends on its companions",
                supports="EXACT",
            ),
            _Asked(
                "A04", "does it fold?",
                "it folds into the layer in front, to rounding",
                "it does not fold",
                supports="EXACT",
            ),
            _Asked(
                "C05", "is the inconsistency harmless, trained with a large batch?",
                "after training with a large batch, stored statistics are as good as training mode, to half a point",
                "after training with a large batch, stored statistics lose against training mode",
            ),
            _Asked(
                "C05", "do statistics of the training set mend it?",
                "after training with a small one, recalibrated statistics beat the stored ones",
                "after training with a small one, recalibrated statistics do not beat the stored ones",
            ),
        ),
    ),
    _Situation(
        "No normalizer of activations possible",
        "Weight normalization, with mean-only Batch Normalization where a batch is at hand; `bake` it for inference.",
        (
            "layer = ns.parametrizations.weight_norm(torch.nn.Conv2d(3, 64, 3))",
            "model = ns.parametrizations.bake(torch.nn.Sequential(layer, ns.nn.MeanOnlyBatchNorm(64)))",
        ),
        "A norm per filter and step; baked, none.",
        "CIFAR-10, error: Batch Normalization 8.05 %, weight normalization 8.46, with mean-only Batch Normalization "
        "7.31 (SK16); ResNet-50: about 6 points behind Batch Normalization (GG17).",
        (
            _Asked(
                "H02", "do the two families differ in generalisation?",
                "Batch Normalization generalises better than weight normalization",
                "weight normalization generalises better than Batch Normalization",
                supports=None,
            ),
            _Asked(
                "H02", "does weight normalization fit the training images better?",
                "weight normalization fits the training images better",
                "weight normalization fits the training images worse",
                supports=None,
            ),
            _Asked(
                "H02", "is a step with Batch Normalization slower by a tenth?",
                "a step with Batch Normalization is slower by a tenth at least",
                "a step with Batch Normalization is not slower by a tenth",
                supports=None,
            ),
        ),
    ),
    _Situation(
        "Very deep networks without shortcuts",
        "Add shortcuts: Batch Normalization cures vanishing gradients of sigmoids, and makes those of ReLU grow.",
        (
            "x = torch.randn(8, 64, 9, 9)",
            'y = ns.nn.BatchNorm2d(64, activation="relu")(torch.nn.Conv2d(64, 64, 3, padding=1)(x), residual=x)',
        ),
        "One more read of the shortcut, fused into the normalizer.",
        "Networks of ReLU with Batch Normalization deeper than about 50 layers do not train on MNIST (YA19).",
        (
            _Asked(
                "B06", "does it stop vanishing?",
                "the gradient of a deep network of sigmoids no longer vanishes",
                "the gradient of a deep network of sigmoids vanishes with it, too",
            ),
            _Asked(
                "B06", "does it stop vanishing and exploding?",
                "gradients neither vanish nor grow with it, of ReLU neither",
                "gradients vanish or grow with it",
                mixed="with ReLU the gradient grows from layer to layer because of it",
            ),
        ),
    ),
    _Situation(
        "Regularisation and weight decay",
        "Keep γ and β, spare them and the biases from weight decay, and tune dropout again: less of it may do.",
        ("optimizer = torch.optim.SGD(ns.optim.decay_groups(network(), 5e-4), lr=0.1, momentum=0.9)",),
        "Nothing.",
        "CaffeNet with Batch Normalization is best with dropout of 0.2: 52.7 % against 51.3 without (MI16); γ and β "
        "are worth half a point to two (FR21).",
        (
            _Asked(
                "B09", "must γ and β not be left out?",
                "without γ and β five points and more are lost",
                "without γ and β less than a point is lost",
                supports="REFUTED",
            ),
            _Asked(
                "B10", "does the noise of batch statistics regularise?",
                "the noise of batch statistics narrows the gap between training and test",
                "the noise of batch statistics does not narrow the gap between training and test",
            ),
            _Asked(
                "B10", "does it replace dropout?",
                "it does without dropout what a network without it does with",
                "it does not replace dropout",
            ),
            _Asked(
                "B10", "is dropout needless with it?",
                "dropout adds nothing to it",
                "dropout changes the accuracy with it, too",
            ),
            _Asked(
                "B11", "is decay under normalization more than a schedule of norms?",
                "weight decay under it is more than a schedule of the weights' norms",
                "weight decay under it does what a schedule of the weights' norms does: it sets the rate",
                supports=None,
            ),
        ),
    ),
    _Situation(
        "What it costs",
        "Measure before you replace it for speed: Batch Normalization is bound by memory, whitening by arithmetic.",
        ("report = ns.accelerate(network(), images)",),
        "[Benchmarks](benchmarks.md) hold the times of every layer on our machines; `normscope bench` those on yours.",
        "A quarter of ResNet-50's training time on a Titan X Pascal (GG17).",
        (
            _Asked(
                "A14", "does it multiply matrices?",
                "Batch Normalization computes matrix products",
                "Batch Normalization computes no matrix product: sums, and maps element by element",
                supports="REFUTED",
            ),
            _Asked(
                "D01", "is a step slower?",
                "a training step of a small network takes longer with it",
                "a training step of a small network takes no longer with it",
                supports=None,
            ),
            _Asked(
                "D01", "is it faster by the clock?",
                "it reaches the accuracy of the network without in less time by the clock",
                "it does not reach the accuracy of the network without in less time by the clock",
                supports=None,
            ),
            _Asked(
                "A15", "is whitening expensive and singular?",
                "whitening costs powers of the channels more, and has no gradient where eigenvalues meet",
                "whitening costs no more than Batch Normalization",
                mixed="whitening costs powers of the channels more; its gradient is singular through eigenvectors only",
            ),
            _Asked(
                "H03", "do decorrelated layer inputs train faster?",
                "whitened layer inputs train faster, step by step",
                "whitened layer inputs train no faster, step by step",
                supports=None,
            ),
            _Asked(
                "H03", "is whitening expensive?",
                "a run whitened by eigenvectors takes longer",
                "a run whitened by eigenvectors takes no longer",
                supports=None,
            ),
        ),
    ),
)  # fmt: skip


def advice(experiments: Sequence[Experiment]) -> tuple[Advice, ...]:
    """Every situation, its sentences as the judged experiments have them.

    Raises:
        ArgumentError: a sentence rests on a question that its experiment does not answer once.
    """
    judged = {e.registration.name: e for e in experiments if e.judgements}
    return tuple(
        Advice(s.title, s.use, s.call, s.cost, s.published, tuple(_point(asked, judged) for asked in s.asked))
        for s in SITUATIONS
    )


def _point(asked: _Asked, judged: dict[str, Experiment]) -> Point:
    if asked.experiment not in judged:
        return Point(f"Not measured: whether {asked.yes}.", "unknown", asked.experiment, None)
    found = [j for j in judged[asked.experiment].judgements if j.question == asked.question]
    if len(found) != 1:
        raise ArgumentError(f"{asked.experiment} does not answer {asked.question!r}", cure="correct the advice")
    (judgement,) = found
    clauses = {"CONFIRMED": asked.yes, "EXACT": asked.yes, "REFUTED": asked.no, "CONDITIONAL": asked.mixed}
    clause = clauses.get(judgement.verdict, "")
    if not clause:
        return Point(f"Not decided: whether {asked.yes}.", "unknown", asked.experiment, judgement)
    text = f"{clause[0].upper()}{clause[1:]}."
    if asked.supports is None:
        return Point(text, "note", asked.experiment, judgement)
    supported = judgement.verdict in (asked.supports, "CONDITIONAL")
    return Point(text, "for" if supported else "against", asked.experiment, judgement)
