"""From merged recipes with stages, a pipeline's or a pretraining's, to dataclasses; all mistakes of all stages are told
at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar, get_type_hints

from litrecipe.config.checks import Mistake, check
from litrecipe.config.groups import EvaluateRecipe, TrainingRecipe
from litrecipe.config.merge import Mistakes, Node, overlay, show
from litrecipe.config.pipeline import FINAL, NAME, NAMING, PipelineRecipe, Stage
from litrecipe.config.pretrain import EACH_STAGE, PretrainRecipe, check_stages
from litrecipe.config.recipes import RECIPES
from litrecipe.config.walk import Walk, held_against, leaves, nearest

Recipe = TypeVar("Recipe")

VERBS = {verb: kind for verb, kind in RECIPES.items() if issubclass(kind, TrainingRecipe | EvaluateRecipe)}
"""What a stage may be."""
GIVEN = {("out_dir",): "is out_dir/{name} of the pipeline", ("checkpoint", "resume"): "is checkpoint.resume of all"}
"""What the pipeline decides for its stages."""


def read_pipeline(tree: Node, mistakes: Mistakes, *, whole: bool = True) -> PipelineRecipe:
    """The recipe in a merged tree; what is wrong is added to `mistakes`, what is missing only where `whole`."""
    nodes = tree.value.get("stages", Node({}))
    top = Node({name: node for name, node in tree.value.items() if name != "stages"}, tree.where)
    before = len(mistakes)
    pipeline, where = held_against(PipelineRecipe, top, mistakes, whole=whole)
    seed = max(0, pipeline.seed)  # a wrong one has its line already
    given = Node({"train": Node({"seed": Node(seed, text=str(seed))})})
    if len(mistakes) == before and "slurm" in top.value:  # what is wrong with it is told once
        given.value["slurm"] = top.value["slurm"]
    if not nodes.is_group:
        mistakes.append(f"{nodes.where}stages: {show(nodes)}: give stages by name: {{sft: {{verb: finetune, …}}, …}}")
        return pipeline
    for name, node in nodes.value.items():
        if (stage := _read(name, node, given, list(nodes.value), mistakes)) is not None:
            pipeline.stages[name] = stage
    if whole and not nodes.value and not mistakes.unread:
        mistakes.append("stages: missing: give stages by name: {sft: {verb: finetune, …}, …}")
    for name in pipeline.only:
        if name not in nodes.value:
            mistakes.append(f"{where.get('only', '')}only: {name}: no such stage{_cure(name, list(nodes.value))}")
    if not mistakes.unread:
        mistakes += _misplaced(pipeline, list(nodes.value))
    return pipeline


def _read(name: str, node: Node, given_to_all: Node, names: list[str], mistakes: Mistakes) -> Stage | None:
    """A stage over what the pipeline gives to all of them."""
    key = f"stages.{name}"
    if not NAME.fullmatch(name) or name == FINAL:
        mistakes.append(f"{node.where}{key}: no name for a stage: {NAMING}, and do not take `{FINAL}`")
        return None
    if not node.is_group:
        mistakes.append(f"{node.where}{key}: {show(node)}: is a group: give its verb and its recipe")
        return None
    verb = node.value.get("verb")
    if verb is None and not node.where:  # no file has it: a flag reaches into the void
        others = [other for other in names if other != name]
        mistakes.append(f"{key}: no such stage{_cure(name, others)}")
        return None
    said = "missing" if verb is None else show(verb)
    if verb is None or verb.text not in VERBS:
        word = verb.text or "" if verb is not None else ""
        near = [known for known in VERBS if known.split()[-1] == word] or nearest(word, list(VERBS))
        cure = f"did you mean {near[0]}?" if near else f"give one of {', '.join(VERBS)}"
        mistakes.append(f"{(verb or node).where}{key}.verb: {said}: {cure}")
        return None
    kind = VERBS[verb.text]
    for path, why in GIVEN.items():
        given: Node | None = node
        for part in path:
            given = given.value.get(part) if given is not None and given.is_group else None
        if given is not None and (given.is_flag or given.value is not None):
            mistakes.append(f"{given.where}{key}.{'.'.join(path)}: {show(given)}: {why.format(name=name)}: remove it")
    recipe = Node({inner: child for inner, child in node.value.items() if inner != "verb"}, node.where)
    below = {name: child for name, child in given_to_all.value.items() if name in get_type_hints(kind)}
    recipe = overlay(Node(below), recipe)
    found, where = recipe_of(kind, recipe, mistakes, prefix=f"{key}.", where=node.where)
    places = {inner.removeprefix(f"{key}."): place for inner, place in where.items()}
    return Stage(verb.text, found, places | {"": node.where})


def recipe_of(
    kind: type[Recipe], tree: Node, mistakes: Mistakes, *, whole: bool = True, prefix: str = "", where: str = ""
) -> tuple[Recipe, dict[str, str]]:
    """As `held_against`, with the stages of a pretraining: each is a recipe of its own, which says what all stages say
    where it says nothing."""
    nodes = tree.value.get("stages")
    if kind is not PretrainRecipe or nodes is None:
        return held_against(kind, tree, mistakes, whole=whole, prefix=prefix, where=where)
    if not nodes.is_group:
        mistakes.append(f"{nodes.where}{prefix}stages: {show(nodes)}: give stages by name: {{core: {{…}}, …}}")
        nodes = Node({})
    outside = Node({name: node for name, node in tree.value.items() if name != "stages"}, tree.where)
    whole = whole and not mistakes.unread
    walk = Walk(kind, prefix)
    recipe = walk.group(kind, outside, prefix)
    mistakes += walk.mistakes
    # What stages may have for themselves is missing in those that lack it.
    later = EACH_STAGE if nodes.value else ()
    of_all = [one for one in _found(recipe, mistakes) if one[1] != "missing" or (whole and one[0] not in later)]
    mistakes += walk.told(of_all, where)
    places = walk.where
    for name, node in nodes.value.items():
        key = f"{prefix}stages.{name}"
        if not NAME.fullmatch(name):
            mistakes.append(f"{node.where}{key}: no name for a stage: {NAMING}")
        elif not node.is_group:
            mistakes.append(f"{node.where}{key}: {show(node)}: is a group: give the keys in which the stage differs")
        else:
            alone, walk = Walk(kind, f"{key}."), Walk(kind, f"{key}.")
            alone.group(kind, node, f"{key}.")
            mistakes += [*_foreign(node, key), *alone.mistakes]
            stage = recipe.stages[name] = walk.group(kind, _over(outside, node), f"{key}.")  # type: ignore[attr-defined]
            found = [one for one in _found(stage, mistakes) if one not in of_all and (whole or one[1] != "missing")]
            mistakes += walk.told(found, node.where)
            places |= walk.where
    for name, value, cure in check_stages(recipe):  # type: ignore[arg-type]
        mistakes.append(f"{places.get(f'{prefix}{name}', '')}{prefix}{name}: {value}: {cure}")
    return recipe, places


def _found(recipe: object, mistakes: Mistakes) -> list[Mistake]:
    """Mistakes in the values of a recipe, unless something of it could not be read."""
    return [] if mistakes.unread else list(check(recipe))


def _over(outside: Node, stage: Node) -> Node:
    """A stage laid over what stands outside of it; where it has no teacher, without what only one would know."""
    distil = stage.value.get("distil")
    if distil is None or not _does_without(distil):
        return overlay(outside, stage)
    own = distil.value if distil.is_group else {"teacher": distil}
    rest = Node({name: node for name, node in outside.value.items() if name != "distil"}, outside.where)
    return overlay(rest, Node(stage.value | {"distil": Node(own, distil.where)}, stage.where))


def _does_without(distil: Node) -> bool:
    """Whether a stage says `distil: {teacher: null}`, or `distil: null`."""
    teacher = distil.value.get("teacher") if distil.is_group else distil
    if teacher is None or teacher.text == "null":
        return teacher is not None
    return distil.is_group and not teacher.is_flag and teacher.value is None


def _foreign(stage: Node, key: str) -> Iterator[str]:
    """Keys of a stage that must be the same in all of them."""
    known = {f"{key}.{name}" for name in EACH_STAGE}
    whole = Walk(PretrainRecipe, f"{key}.").keys
    for name, leaf in leaves(key, stage):
        if name in whole and name not in known:
            yield f"{leaf.where}{name}: {show(leaf)}: is the same in all stages: write it outside of them"


def _misplaced(pipeline: PipelineRecipe, names: list[str]) -> Iterator[str]:
    """References to what is not there, or not there yet."""
    for name, stage in pipeline.stages.items():
        before = names[: names.index(name)]
        for key, other, file in stage.references():
            line = f"{stage.where.get(key, '')}stages.{name}.{key}: stage:{other}"
            made = pipeline.stages.get(other)
            if other not in names:
                yield f"{line}: no such stage{_cure(other, before)}"
            elif other not in before:
                yield f"{line}: runs {'later' if other != name else 'just then'}: write that stage above this one"
            elif not file and made is not None and not made.makes_a_model:
                yield f"{line}: makes no model: name a file of it (`stage:{other}/…`), or another stage"


def _cure(name: str, known: list[str]) -> str:
    near = nearest(name, known)
    return f": did you mean {near[0]}?" if near else f": there are {', '.join(known) or 'none'}"
