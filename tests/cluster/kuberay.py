"""The fields of KubeRay's custom resources (ray.io/v1, KubeRay 1.7) that cluster/kuberay uses, as JSON Schema.

Written after the Go types of the operator. A field that is not here may exist, but nobody here has looked it up: it has
to be added with its rule before it can be used. Pod templates are Kubernetes' own and are checked against its schema.
"""

from typing import Any

TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
# Parameters of `ray start` are given as strings, numbers too.
PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}
TEMPLATE = {"type": "object", "required": ["spec"]}
# What `ray start --labels` is given.
LABELS = {"type": "object", "additionalProperties": TEXT}


def record(required: list[str], **properties: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


GROUP = record(
    ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
    # It becomes a part of the pods' names.
    groupName={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"},
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    priority={"type": "integer"},
    labels=LABELS,
    rayStartParams=PARAMETERS,
    template=TEMPLATE,
)
AUTOSCALER = record(
    [],
    version={"enum": ["v1", "v2"]},
    idleTimeoutSeconds=COUNT,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    securityContext={"type": "object"},
)
REDIS = record(
    ["redisAddress"],
    redisAddress=TEXT,
    redisPassword={"oneOf": [record(["value"], value=TEXT), record(["valueFrom"], valueFrom={"type": "object"})]},
    externalStorageNamespace=TEXT,
)
CLUSTER = record(
    ["headGroupSpec"],
    rayVersion=TEXT,
    authOptions=record(["mode"], mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=AUTOSCALER,
    gcsFaultToleranceOptions=REDIS,
    headGroupSpec=record(["rayStartParams", "template"], labels=LABELS, rayStartParams=PARAMETERS, template=TEMPLATE),
    workerGroupSpecs={"type": "array", "items": GROUP},
)
JOB = record(
    ["entrypoint", "rayClusterSpec"],
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes={"const": True},
    # Has its effect with shutdownAfterJobFinishes alone.
    ttlSecondsAfterFinished=COUNT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    submitterConfig=record([], backoffLimit=COUNT),
    submitterPodTemplate=TEMPLATE,
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    rayClusterSpec=CLUSTER,
)
SERVICE = record(
    ["serveConfigV2", "rayClusterConfig"],
    upgradeStrategy=record(["type"], type={"enum": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]}),
    rayClusterDeletionDelaySeconds=COUNT,
    excludeHeadPodFromServeSvc={"type": "boolean"},
    serveConfigV2=TEXT,
    rayClusterConfig=CLUSTER,
)
SPECS = {"RayCluster": CLUSTER, "RayJob": JOB, "RayService": SERVICE}


def cluster_of(resource: dict[str, Any]) -> dict[str, Any]:
    """The specification of the Ray cluster within a resource."""
    places = {"RayCluster": [], "RayJob": ["rayClusterSpec"], "RayService": ["rayClusterConfig"]}
    spec: dict[str, Any] = resource["spec"]
    for place in places[resource["kind"]]:
        spec = spec[place]
    return spec


def templates_of(resource: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Pod templates of a resource by what they are for."""
    if resource["kind"] in ("StatefulSet", "Deployment"):
        return {resource["metadata"]["name"]: resource["spec"]["template"]}
    if resource["kind"] not in SPECS:
        return {}
    cluster = cluster_of(resource)
    found = {"head": cluster["headGroupSpec"]["template"]}
    found |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    if "submitterPodTemplate" in resource["spec"]:
        found["submitter"] = resource["spec"]["submitterPodTemplate"]
    return found
