"""One's own defaults for the `slurm` group: a YAML file with its keys, and under `clusters` those of each cluster."""

from __future__ import annotations

import os
from pathlib import Path

from litrecipe.config.merge import Mistakes, Node, overlay, read_file, show
from litrecipe.config.walk import nearest

CLUSTERS = "clusters"
"""Name → the keys in which a cluster differs."""
VARIABLE = "LITRECIPE_SLURM"
"""Names the file, where it is not at its usual place."""


def defaults_file() -> Path | None:
    """The file of one's own defaults, if there is one: `$LITRECIPE_SLURM`, or ~/.config/litrecipe/slurm.yaml."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    path = config / "litrecipe" / "slurm.yaml"
    return path if path.is_file() else None


def with_defaults(tree: Node, mistakes: Mistakes) -> Node:
    """A merged recipe over one's own defaults for its `slurm` group, and those of its cluster.

    What is wrong with the file is added to `mistakes`, with its lines.
    """
    path = defaults_file()
    written = Node({}) if path is None else read_file(path, mistakes)
    clusters = written.value.pop(CLUSTERS, Node({}))
    if not clusters.is_group:
        mistakes.append(f"{clusters.where}{CLUSTERS}: {show(clusters)}: give keys by name: {{big: {{partition: gpu}}}}")
        clusters = Node({})
    group = tree.value.get("slurm", Node({}))
    asked = (group.value.get("cluster") if group.is_group else None) or written.value.get("cluster")
    if asked is not None and asked.text is not None and (asked.is_flag or asked.value is not None):
        cluster = clusters.value.get(asked.text)
        if cluster is None:
            near = nearest(asked.text, list(clusters.value))
            there = f"did you mean {near[0]}?" if near else f"there are {', '.join(clusters.value) or 'none'}"
            file = path or f"~/.config/litrecipe/slurm.yaml (or ${VARIABLE})"
            mistakes.append(
                f"{asked.where}slurm.cluster: {asked.text}: no such name under `{CLUSTERS}` in {file}: {there}"
            )
        elif cluster.is_group:
            written = overlay(written, cluster)
        elif cluster.value is not None:
            mistakes.append(f"{cluster.where}{CLUSTERS}.{asked.text}: {show(cluster)}: is a group: give its keys")
    return overlay(Node({"slurm": written}), tree) if written.value else tree
