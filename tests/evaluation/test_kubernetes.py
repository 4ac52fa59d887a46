"""The manifest of an evaluation in a pod: every field by its name in Kubernetes' API, every value that isolates as it must be.

There is no cluster here: the schema below is the part of the API that the manifest uses, and nothing beside it is allowed.
"""

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

MANIFEST = Path(__file__).parents[2] / "infra" / "kubernetes" / "evaluation.yaml"
TEXT = {"type": "string", "minLength": 1}
LABELS = {"const": {"app": "varflow-evaluation"}}
USER = {"type": "integer", "minimum": 1000, "maximum": 65534}


def fields(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object with these fields, all of them and no other."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def some(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": item}


AMOUNTS = fields(cpu={"type": "string", "pattern": r"^\d+m?$"}, memory={"type": "string", "pattern": r"^\d+[MGT]i$"})
CONTAINER = fields(
    name=TEXT,
    image=TEXT,
    command={"const": ["python", "-m", "evaluation", "/data/job.json"]},
    env=some(fields(name=TEXT, value=TEXT)),
    resources=fields(requests=AMOUNTS, limits=AMOUNTS),
    securityContext=fields(
        allowPrivilegeEscalation={"const": False},
        readOnlyRootFilesystem={"const": True},
        capabilities={"const": {"drop": ["ALL"]}},
    ),
    volumeMounts=some(fields(name=TEXT, mountPath={"enum": ["/data", "/tmp"]})),
)
VOLUMES = [
    fields(name=TEXT, persistentVolumeClaim=fields(claimName=TEXT)),
    fields(name=TEXT, emptyDir=fields(sizeLimit=AMOUNTS["properties"]["memory"])),
]
POD = fields(
    restartPolicy={"const": "Never"},
    automountServiceAccountToken={"const": False},
    enableServiceLinks={"const": False},
    hostUsers={"const": False},
    securityContext=fields(
        runAsNonRoot={"const": True},
        runAsUser=USER,
        runAsGroup=USER,
        fsGroup=USER,
        seccompProfile={"const": {"type": "RuntimeDefault"}},
    ),
    containers=some(CONTAINER) | {"maxItems": 1},
    volumes=some({"oneOf": VOLUMES}),
)
KINDS = {
    "NetworkPolicy": fields(
        apiVersion={"const": "networking.k8s.io/v1"},
        kind=TEXT,
        metadata=fields(name=TEXT),
        spec=fields(podSelector=fields(matchLabels=LABELS), policyTypes={"const": ["Ingress", "Egress"]}),
    ),
    "Job": fields(
        apiVersion={"const": "batch/v1"},
        kind=TEXT,
        metadata=fields(name=TEXT),
        spec=fields(
            backoffLimit={"type": "integer", "minimum": 0}, template=fields(metadata=fields(labels=LABELS), spec=POD)
        ),
    ),
}


@pytest.fixture
def objects() -> dict[str, Any]:
    return {found["kind"]: found for found in yaml.safe_load_all(MANIFEST.read_text())}


def test_every_field_is_of_the_api_and_isolates(objects: dict[str, Any]) -> None:
    assert objects.keys() == KINDS.keys()
    for kind, schema in KINDS.items():
        jsonschema.validate(objects[kind], schema)
    pod = objects["Job"]["spec"]["template"]["spec"]
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_a_rule_or_a_misspelt_field_would_be_found(objects: dict[str, Any]) -> None:
    open_policy = copy.deepcopy(objects["NetworkPolicy"])
    open_policy["spec"]["egress"] = [{}]
    with pytest.raises(jsonschema.ValidationError, match="egress"):
        jsonschema.validate(open_policy, KINDS["NetworkPolicy"])
    loose = copy.deepcopy(objects["Job"])
    context = loose["spec"]["template"]["spec"]["containers"][0]["securityContext"]
    context["readOnlyRootFileSystem"] = context.pop("readOnlyRootFilesystem")
    with pytest.raises(jsonschema.ValidationError, match="readOnlyRootFileSystem"):
        jsonschema.validate(loose, KINDS["Job"])
