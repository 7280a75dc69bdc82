"""What a user may get wrong about variants, and what the catalogue tells."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from hf_sampa import SAMPaTrainer
from hf_sampa.variants import VARIANTS
from hf_sampa.variants.__main__ import main
from hf_sampa.variants.parts import Direction, Mask, Mixing, When
from hf_sampa.variants.recipe import Recipe
from hf_sampa.variants.sample_parts import Loss, Samples
from tests import tiny
from tests.former import as_before


REFUSED = {
    "nearest names": (
        {"variant": "look-samm"},
        r"variant: there is no 'look-samm'; did you mean looksam.*python -m hf_sampa.variants",
    ),
    "no name is near": (
        {"variant": "zzz"},
        r"variant: there is no 'zzz'\. `python -m hf_sampa.variants` shows them all",
    ),
    "no name": ({"variant": None}, "variant: expected the name of one, got None"),
    "arguments that are none": (
        {"variant_args": 5},
        "variant_args: expected a dict of arguments by name, or a list of",
    ),
    "arguments by number": (
        {"variant_args": {1: 0.9}},
        "variant_args: expected a dict of arguments by name, or a list of",
    ),
    "infinite": (
        {"variant": "asam", "variant_args": {"eta": float("inf")}},
        "variant_args: eta of 'asam' is to be a number, at least 0, got inf",
    ),
    "infinitely many": (
        {"method": "sam", "variant": "looksam", "variant_args": {"k": float("inf")}},
        "variant_args: k of 'looksam' is to be a whole number, at least 1, got inf",
    ),
    "a truth for a radius": ({"rho": True}, "rho: expected a finite number of at least 0, got True"),
    "unknown argument": (
        {"variant": "vasso", "variant_args": {"thta": 0.5}},
        r"variant_args: 'vasso' has no argument 'thta'; did you mean theta\? It takes theta=0.4",
    ),
    "argument of a variant that has none": (
        {"variant_args": {"eta": 0.5}},
        r"variant_args: 'sam' has no argument 'eta'\. It takes none",
    ),
    "out of range": (
        {"variant": "vasso", "variant_args": {"theta": 0.0}},
        r"variant_args: theta of 'vasso' is to be a number, above 0 to 1, got 0.0",
    ),
    "not a number": (
        {"variant": "asam", "variant_args": ["eta=much"]},
        r"variant_args: eta of 'asam' is to be a number, at least 0, got 'much'",
    ),
    "not finite": (
        {"variant": "asam", "variant_args": ["eta=nan"]},
        r"variant_args: eta of 'asam' is to be a number, at least 0, got 'nan'",
    ),
    "not a whole number": (
        {"variant": "looksam", "method": "sam", "variant_args": ["k=2.5"]},
        r"variant_args: k of 'looksam' is to be a whole number, at least 1, got '2.5'",
    ),
    "not a choice": (
        {"variant": "bisam", "variant_args": {"phi": "exp"}},
        r"variant_args: phi of 'bisam' is to be one, log or tanh, got 'exp'",
    ),
    "arguments that do not fit": (
        {"variant": "vsam", "method": "sam", "variant_args": {"start": 60}},
        r"variant_args: start of 'vsam' is to be at most its window, 50, got 60",
    ),
    "no equals sign": ({"variant_args": ["eta"]}, r"variant_args: expected name=value, as in .*, got 'eta'"),
    "a timing it does not have": (
        {"variant": "looksam", "method": "sampa"},
        r"method: expected 'sam' for variant 'looksam', because a pair takes both gradients.*got 'sampa'\. Set method='sam'",
    ),
    "another lambda": (
        {"variant": "optgd", "lmbda": 0.2},
        r"lmbda: expected 1, which is what variant 'optgd' is, got 0.2\. Leave it out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_are_refused(tmp_path, case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        tiny.arguments(tmp_path, **settings)


def test_names_may_be_written_as_in_the_papers(tmp_path):
    args = tiny.arguments(tmp_path, variant="SAM-ON", variant_args=None)
    assert type(args.recipe().mask).__name__ == "NormLayersOnly"
    assert args.rho == 0.5
    assert tiny.arguments(tmp_path, variant="VaSSO", variant_args=["theta=0.9"]).variant_args == {"theta": 0.9}


PER_SAMPLE = [("bisam", "sampa"), *((name, "sam") for name in ("ksam", "esam", "ausam", "bisam", "saf", "mesa"))]


@pytest.mark.parametrize(("name", "method"), PER_SAMPLE)
def test_models_without_classes(tmp_path, name, method):
    args = tiny.arguments(tmp_path, variant=name, method=method)
    for model, dataset in (
        (tiny.regression_bert(), tiny.scored_sentences(8)),
        (tiny.token_bert(), tiny.tagged_sentences(8)),
    ):
        trainer = SAMPaTrainer(model=model, args=args, train_dataset=dataset)
        with pytest.raises(
            ValueError, match=r"variant: expected a model that sorts each sample into one of several classes"
        ):
            trainer.train()


@pytest.mark.parametrize("name", ["ausam", "saf"])
def test_datasets_without_places(tmp_path, name):
    args = tiny.arguments(tmp_path, variant=name, method="sam", max_steps=2)
    with pytest.raises(ValueError, match="expected a dataset with a length and a place for every sample.*iterable"):
        SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.Stream(8)).train()


class OwnLoss(SAMPaTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_a_compute_loss_that_hides_the_logits(tmp_path):
    trainer = OwnLoss(
        model=tiny.bert(), args=tiny.arguments(tmp_path, variant="bisam"), train_dataset=tiny.sentences(8)
    )
    with pytest.raises(ValueError, match=r"calls super\(\)\.compute_loss\(\).*but that of OwnLoss does not"):
        trainer.train()


def test_a_model_without_normalization(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="SAM-ON perturbs normalization layers alone, but the model has no trainable"):
        SAMPaTrainer(
            model=model, args=tiny.arguments(tmp_path, variant="sam_on"), train_dataset=tiny.images(8)
        ).train()


CHANGES = {
    "another variant": ({"variant": "asam", "rho": 0.05}, "variant: 'vasso' in the checkpoint, 'asam' now"),
    "another argument": (
        {"variant_args": {"theta": 0.9}},
        "variant_args: {'theta': 0.4} in the checkpoint, {'theta': 0.9}",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_resume_with_another_variant(tmp_path, case):
    changes, message = CHANGES[case]
    settings = {"variant": "vasso", "save_strategy": "steps", "save_steps": 2}
    tiny.run(tmp_path, tiny.bert, tiny.sentences(16), max_steps=2, **settings)
    with pytest.raises(ValueError, match=f"Expected the variant that .* but it changed: .*{message}"):
        tiny.run(tmp_path, tiny.bert, tiny.sentences(16), resume=True, **{**settings, **changes})


def test_parts_that_have_no_place_in_parallel(tmp_path):
    class Sometimes(When):
        def __call__(self, now, norm):
            return now.step % 2 == 0

    trainer = SAMPaTrainer(
        model=tiny.bert(),
        args=tiny.arguments(tmp_path),
        train_dataset=tiny.sentences(8),
        recipe=Recipe(when=Sometimes()),
    )
    with pytest.raises(ValueError, match="expected 'sam' for this recipe, whose when leaves out steps; got 'sampa'"):
        trainer.train()


def test_samples_that_would_never_be_asked():
    class EverySecond(Samples):
        def choose(self, losses, indices, now):
            return indices % 2 == 0

    with pytest.raises(ValueError, match="expected looks_first or reads_indices to be True.*Set it in EverySecond"):
        Recipe(samples=EverySecond())


def test_samples_in_parallel_are_refused_for_what_they_do():
    class Chosen(Samples):
        looks_first = True

    class Noted(Samples):
        """Chooses nothing."""

    Recipe(samples=Noted()).check_parallel()
    with pytest.raises(ValueError, match="whose samples are chosen by losses or are not those of B_t; got 'sampa'"):
        Recipe(samples=Chosen()).check_parallel()


class Sign(Direction):
    """A method of one's own: eps_t = rho scale sign(g_t) / sqrt(d)."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, g, x, norm, now):
        for each in g:
            each.sign_()
        return sum(each.numel() for each in g) ** 0.5 / self.scale


@pytest.mark.parametrize("method", ["sam", "sampa"])
def test_a_recipe_of_ones_own(tmp_path, method):
    weights = {}
    for name, recipe in {"own": Recipe(direction=Sign()), "sam": None}.items():
        trainer = SAMPaTrainer(
            model=tiny.bert(),
            args=tiny.arguments(tmp_path, method=method, save_strategy="steps", save_steps=2),
            train_dataset=tiny.sentences(16),
            recipe=recipe,
        )
        trainer.train()
        weights[name] = trainer.model.classifier.weight
    assert not torch.equal(weights["own"], weights["sam"])
    resumed = {"model": tiny.bert(), "args": tiny.arguments(tmp_path, method=method)}
    resumed["train_dataset"] = tiny.sentences(16)
    with pytest.raises(ValueError, match="Expected the variant that .* but it changed"):
        SAMPaTrainer(**resumed, recipe=Recipe(direction=Sign())).train(str(tmp_path / "checkpoint-2"))


class Everything(Mask):
    """Keeps all, and says so."""

    def bind(self, model, names, params):
        self.kept = [True] * len(params)

    def keeps(self, now):
        return self.kept


@pytest.mark.parametrize("method", ["sam", "sampa"])
def test_a_mask_that_keeps_everything_is_sam(tmp_path, method):
    weights = []
    for recipe in (Recipe(mask=Everything()), None):
        args, data = tiny.arguments(tmp_path, method=method, max_steps=3), tiny.sentences(16)
        trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=data, recipe=recipe)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert tiny.differing(*weights) == []


def test_a_resume_with_other_arguments_of_a_recipe_of_ones_own(tmp_path):
    def trainer(scale):
        args = tiny.arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
        data, recipe = tiny.sentences(16), Recipe(direction=Sign(scale))
        return SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=data, recipe=recipe)

    trainer(0.5).train()
    message = r"direction: 'Sign\(scale=0.5\)' in the checkpoint, 'Sign\(scale=0.9\)' now"
    with pytest.raises(ValueError, match=message):
        trainer(0.9).train(str(tmp_path / "checkpoint-2"))
    trainer(0.5).train(str(tmp_path / "checkpoint-2"))


def test_the_catalogue_tells_of_every_variant(capsys):
    main([])
    text = capsys.readouterr().out
    for name, variant in VARIANTS.items():
        assert f"\n{name}\n" in f"\n{text}"
        assert variant.source.partition(",")[0] in " ".join(text.split())
    main(["looksam"])
    text = " ".join(capsys.readouterr().out.split())
    assert "k=5 (at least 1), alpha=0.7 (at least 0)" in text
    assert "parts: when Periodic, mixing Orthogonal" in text
    assert "sequential (--method sam); no other, because a pair takes both gradients" in text


def test_the_catalogue_suggests_names(capsys):
    with pytest.raises(SystemExit):
        main(["looksamm"])
    assert "did you mean looksam" in capsys.readouterr().err


def test_arsam_says_that_it_is_a_reconstruction(capsys):
    main(["arsam"])
    text = " ".join(capsys.readouterr().out.split())
    assert "reconstructed from its abstract" in text
    assert "a reconstruction" in text


def test_a_checkpoint_from_before_variants_goes_on(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    whole = tiny.run(tmp_path, tiny.bert, tiny.sentences(16), **settings)
    file = tmp_path / "checkpoint-2" / "sampa.json"
    manifest = json.loads(file.read_text())
    del manifest["recipe"]
    manifest["unlogged"]["means"]["steps"] = 2  # one number for all means
    file.write_text(json.dumps(manifest))
    as_before(file.parent)
    resumed = tiny.run(tmp_path, tiny.bert, tiny.sentences(16), resume=str(file.parent), **settings)
    assert tiny.differing(tiny.comparable(whole), tiny.comparable(resumed)) == []


def trainer_of(folder, recipe=None, model=tiny.bert, dataset=None, **changes):
    args = tiny.arguments(folder, max_steps=4, **changes)
    return SAMPaTrainer(model=model(), args=args, train_dataset=dataset or tiny.sentences(16), recipe=recipe)


class Wandering(Mask):
    """Perturbs every second parameter, another half after each gradient that it has seen."""

    state = ("seen",)
    asked = 0

    def __init__(self):
        self.seen = 0

    def bind(self, model, names, params):
        self.count = len(params)

    def keeps(self, now):
        self.asked += 1
        return [(i + self.seen) % 2 == 0 for i in range(self.count)]

    def observe(self, g, now):
        self.seen += 1


@pytest.mark.parametrize("method", ["sam", "sampa"])
def test_a_mask_is_asked_once_a_step_and_sees_every_gradient(tmp_path, method):
    trainer = trainer_of(tmp_path, Recipe(mask=Wandering()), method=method)
    trainer.train()
    mask = trainer.sampa.recipe.mask
    assert (mask.asked, mask.seen) == (4, 4)


class Heavy(Direction):
    """A running sum of g_t, which remembers."""

    state = ("v",)

    def __init__(self):
        self.v = None

    def __call__(self, g, x, norm, now):
        self.v = [each.clone() if self.v is None else 0.5 * self.v[i] + each for i, each in enumerate(g)]
        for each, own in zip(g, self.v, strict=True):
            each.copy_(own)
        return sum(each.square().sum() for each in g) ** 0.5


def test_a_recipe_of_ones_own_begins_every_run_as_it_was_made(tmp_path):
    recipe, weights = Recipe(direction=Heavy()), []
    for _ in range(2):
        trainer = trainer_of(tmp_path, recipe)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert recipe.direction.v is None
    assert tiny.differing(*weights) == []


class Loud(Loss):
    def __call__(self, loss, seen, now):
        return 2 * loss


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(direction=Mixing()), "direction: expected an instance of a Direction, got Mixing"),
        (lambda: Recipe(mask=Mask), "mask: expected an instance of a Mask, got the class Mask"),
        (
            lambda: Recipe(loss=Loud()),
            "loss: expected reads_logits to be True where `__call__` is overridden, got False",
        ),
        (
            lambda: Recipe(samples=Watching()),
            "samples: expected reads_losses to be True where `observe` is overridden",
        ),
    ],
)
def test_parts_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Watching(Samples):
    def observe(self, indices, before, after, now):
        pass


def test_what_is_no_recipe_or_one_too_many(tmp_path):
    with pytest.raises(ValueError, match=r"recipe: expected a Recipe, got 'asam'\. A part goes into one"):
        trainer_of(tmp_path, "asam")
    with pytest.raises(ValueError, match="recipe: expected variant='sam', the default, beside .*, got 'asam'"):
        trainer_of(tmp_path, Recipe(direction=Sign()), variant="asam")


class LossAlone(nn.Module):
    """Gives no logits, as a dict or as a tuple."""

    def __init__(self, as_tuple):
        super().__init__()
        self.as_tuple, self.head = as_tuple, nn.Linear(64, 3)

    def forward(self, pixel_values, labels=None):
        loss = nn.functional.cross_entropy(self.head(pixel_values.flatten(1)), labels)
        return (loss,) if self.as_tuple else {"loss": loss}


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("variant", ["bisam", "ksam"])
def test_a_model_without_logits_is_refused_by_variants_that_need_them(tmp_path, variant, as_tuple):
    trainer = trainer_of(
        tmp_path, model=lambda: LossAlone(as_tuple), dataset=tiny.images(16), variant=variant, method="sam"
    )
    with pytest.raises(ValueError, match="variant: expected a model that sorts each sample .* got logits NoneType"):
        trainer.train()


@pytest.mark.parametrize("method", ["sam", "sampa"])
def test_the_cosine_of_shards_is_a_cosine(tmp_path, method):
    trainer = trainer_of(tmp_path, method=method, variant="msam", variant_args={"size": 1})
    trainer.train()
    cosines = [line["ascent_cosine"] for line in trainer.state.log_history if "ascent_cosine" in line]
    assert len(cosines) == 4 and all(0.5 < cosine <= 1 for cosine in cosines)


def test_the_spelling_of_a_variant_is_not_part_of_it(tmp_path):
    assert tiny.arguments(tmp_path, variant="SAM-ON").variant == "sam_on"


def test_a_variant_that_is_set_later_brings_its_own_defaults(tmp_path):
    """As a hyperparameter search sets it."""

    def after(*variants, **given):
        args = tiny.arguments(tmp_path, rho=None, **given)
        for name in variants:
            args.variant = name
            args.check_settings()
        return args.variant, args.rho, args.lmbda, args.variant_args

    assert after("asam") == ("asam", 0.5, 0.2, {"eta": 0.01})
    assert after("asam", "vasso", "sampa-0") == ("sampa_0", 0.05, 0.0, {})
    assert after("optgd", "sam") == ("sam", 0.05, 0.2, {})
    args = tiny.arguments(tmp_path, rho=0.3, lmbda=0.1)
    args.variant = "asam"
    args.check_settings()
    assert (args.rho, args.lmbda, args.variant_args) == (0.3, 0.1, {"eta": 0.01})
    with pytest.raises(ValueError, match="'vasso' has no argument 'eta'"):
        after("vasso", variant="asam", variant_args={"eta": 0.1})


@pytest.mark.parametrize(("first", "second"), [("gsam", "asam"), ("asam", "vasso"), ("gsam", "sam")])
def test_another_variant_in_the_next_run_of_a_trainer_has_its_own_defaults(tmp_path, first, second):
    args = tiny.arguments(tmp_path, variant=first, max_steps=2)
    trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(8))
    trainer.train()
    args.variant = second
    trainer.train()
    assert args.variant_args == VARIANTS[second].defaults and trainer.sampa.rho == VARIANTS[second].rho


def test_several_arguments_may_stand_in_one_string(tmp_path):
    """As in the YAML file of a comparison, whose values are single ones."""
    args = tiny.arguments(tmp_path, variant="gsam", variant_args="alpha=0 low=0.5")
    assert args.variant_args == {"alpha": 0.0, "low": 0.5}
