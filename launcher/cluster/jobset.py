"""`distui launch --k8s`: a JobSet of pods that call the first one, made and followed by Kubernetes' official client.

The JobSet replaces pods and nodes, the first pod restarts ranks within it. What each exit status of it means is in the
JobSet's failure policy: 75 (saved, and gave way), and pods that Kubernetes itself takes away, start it again without
limit.
"""

from __future__ import annotations

import base64
import re
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from distui.core.config.check import check
from distui.core.config.settings import Resolved
from distui.core.errors import EXIT_OK, EXIT_PREEMPTED, EXIT_RANK_FAILED, EXIT_USER, ConfigError, UserError
from distui.launcher.cluster.certificate import new_certificate
from distui.launcher.cluster.starters.kubernetes import FOLDER_ENV, PORT
from distui.launcher.cluster.submission import options_of
from distui.launcher.job.request import LaunchRequest

GROUP, VERSION, PLURAL = "jobset.x-k8s.io", "v1alpha2", "jobsets"
MOUNT = "/etc/distui"
REPLICATED = "node"
LOOK_S = 2.0
GRACE_S = 120
"""What a pod that is taken away has to save; `cluster.slurm_signal_s` is the same for Slurm."""
SET_BY_US = (
    "cluster.starter",
    "cluster.k8s_image",
    "cluster.k8s_namespace",
    "cluster.k8s_pod",
    "cluster.nodes",
    "cluster.nproc",
)


def name_of(config_name: str, target: str) -> str:
    """Return a name that Kubernetes takes, with a part that no other launch has."""
    slug = re.sub(r"[^a-z0-9]+", "-", (config_name or target).lower()).strip("-")[:30].strip("-") or "run"
    return f"{slug if slug[0].isalpha() else f'run-{slug}'}-{secrets.token_hex(3)}"


def host_names(name: str, nodes: int) -> list[str]:
    """Return the pods' names in DNS, which the JobSet's headless service gives them."""
    return [f"{name}-{REPLICATED}-0-{index}.{name}" for index in range(nodes)]


def manifests(request: LaunchRequest, resolved: Resolved, name: str) -> list[dict[str, Any]]:
    """Return the Secret and the JobSet. Raises: UserError without the client, for a setting that cannot be."""
    try:
        from kubernetes import client
    except ImportError as error:
        raise UserError("the Kubernetes client is not installed", str(error), 'pip install "distui[k8s]"') from error
    config = resolved.config
    cluster = config.cluster
    if not cluster.k8s_image:
        raise UserError(
            "no image is named",
            "pods need one with Python, distui and the script in it",
            "--k8s-image registry/me/train:1, or cluster.k8s_image in distui.toml",
        )
    if not isinstance(cluster.nproc, int):
        fix = "--nproc 8: as many ranks, and GPUs, as each pod is to have"
        raise UserError("--nproc is auto", "what the cluster's nodes have is not seen from here", fix)
    hosts = host_names(name, cluster.nodes)
    listed = ",".join(f"{host}:{cluster.nproc}" for host in hosts)
    shape = config.model_copy(deep=True)
    shape.cluster.hosts = listed
    if problems := check(shape, None, cluster.nproc * cluster.nodes):
        raise ConfigError(problems)
    launch = ["python", "-m", "distui", "launch", "--no-tui", *options_of(request)]
    launch += ["--set", "cluster.starter=kubernetes", "--hosts", listed]
    for key, value in request.overrides.items():
        if key not in SET_BY_US:
            launch += ["--set", f"{key}={value}"]
    for key, value in (("cluster.on_preempt", "save"), ("checkpoint.resume", "always")):
        if resolved.origins[key] == "default":
            launch += ["--set", f"{key}={value}"]
    target = ["-m", *request.target[1:]] if request.target[0] == "-m" else list(request.target)
    call = ["python", "-m", "distui.launcher.node.caller", f"{hosts[0]}:{PORT}"]
    # Every pod calls; the first one holds the job beside that, and its end is the pod's.
    line = (
        f'me={shlex.quote(f"{name}-{REPLICATED}-0-")}"$JOB_COMPLETION_INDEX".{name}; '
        f'if [ "$JOB_COMPLETION_INDEX" != 0 ]; then exec {shlex.join(call)} "$me" {MOUNT}; fi; '
        f'{shlex.join(call)} "$me" {MOUNT} & exec {shlex.join([*launch, *target])}'
    )
    meta = client.V1ObjectMeta(name=name, labels={"app.kubernetes.io/managed-by": "distui"})
    token, (pem, private) = secrets.token_urlsafe(32), new_certificate()
    data = {"token": token.encode(), "cert.pem": pem, "key.pem": private}
    secret = client.V1Secret(
        api_version="v1",
        kind="Secret",
        metadata=meta,
        type="Opaque",
        data={file: base64.b64encode(content).decode() for file, content in data.items()},
    )
    gpus = {"nvidia.com/gpu": str(cluster.nproc)} if cluster.k8s_gpus else None
    container = client.V1Container(
        name="train",
        image=cluster.k8s_image,
        command=["sh", "-c", line],
        env=[client.V1EnvVar(name=FOLDER_ENV, value=MOUNT)],
        ports=[client.V1ContainerPort(container_port=PORT, protocol="TCP")],
        resources=client.V1ResourceRequirements(limits=gpus) if gpus else None,
        volume_mounts=[
            client.V1VolumeMount(name="distui", mount_path=MOUNT, read_only=True),
            client.V1VolumeMount(name="shm", mount_path="/dev/shm"),
        ],
    )
    pod = client.V1PodSpec(
        containers=[container],
        restart_policy="Never",
        termination_grace_period_seconds=GRACE_S,
        volumes=[
            client.V1Volume(name="distui", secret=client.V1SecretVolumeSource(secret_name=name, default_mode=0o444)),
            # 64 MiB, the usual size, is too little for data loaders and NCCL.
            client.V1Volume(name="shm", empty_dir=client.V1EmptyDirVolumeSource(medium="Memory")),
        ],
    )
    gave_way = client.V1PodFailurePolicyRule(
        action="FailJob",
        on_exit_codes=client.V1PodFailurePolicyOnExitCodesRequirement(operator="In", values=[EXIT_PREEMPTED]),
    )
    taken_away = client.V1PodFailurePolicyRule(
        action="FailJob",
        on_pod_conditions=[client.V1PodFailurePolicyOnPodConditionsPattern(type="DisruptionTarget", status="True")],
    )
    job = client.V1JobSpec(
        parallelism=cluster.nodes,
        completions=cluster.nodes,
        completion_mode="Indexed",
        backoff_limit=0,
        pod_failure_policy=client.V1PodFailurePolicy(rules=[gave_way, taken_away]),
        template=client.V1PodTemplateSpec(metadata=client.V1ObjectMeta(labels={"distui.run": name}), spec=pod),
    )
    made: dict[str, Any] = client.ApiClient().sanitize_for_serialization(job)
    merge(made["template"]["spec"], _pod_file(cluster.k8s_pod))
    rules = [
        {
            "name": "gaveway",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
        }
    ]
    jobset = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "JobSet",
        "metadata": client.ApiClient().sanitize_for_serialization(meta),
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": cluster.max_restarts, "rules": rules},
            "replicatedJobs": [{"name": REPLICATED, "replicas": 1, "template": {"spec": made}}],
        },
    }
    return [client.ApiClient().sanitize_for_serialization(secret), jobset]


def _pod_file(path: str) -> Mapping[str, Any]:
    if not path:
        return {}
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cluster.k8s_pod: {path} cannot be read", str(error), "name a YAML file") from error
    if not isinstance(found, dict):
        raise UserError(
            f"cluster.k8s_pod: {path} is no pod's spec", "it is no mapping", "write volumes:, tolerations:, ..."
        )
    return found


def merge(base: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Put `more` over `base`, in place: mappings by key, lists of named things by name, other lists appended."""
    for key, value in more.items():
        known = base.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            merge(known, value)
        elif isinstance(known, list) and isinstance(value, list):
            for item in value:
                same = [
                    one
                    for one in known
                    if isinstance(item, dict) and "name" in item and one.get("name") == item["name"]
                ]
                if same:
                    merge(same[0], item)
                else:
                    known.append(item)
        else:
            base[key] = value


def submit_jobset(request: LaunchRequest, resolved: Resolved) -> int:
    """Make the JobSet and follow it to its end, or print it; return the exit status. Raises: UserError."""
    target = request.target[1] if request.target[0] == "-m" else Path(request.target[0]).stem
    name = name_of(resolved.config.run.name, target)
    made = manifests(request, resolved, name)
    if request.dry_run:
        print(yaml.safe_dump_all(made, sort_keys=False), end="")
        return EXIT_OK
    return Follower(name, resolved.config.cluster.k8s_namespace).run(made, detach=request.detach)


class Follower:
    """One JobSet, from its making to its end; Ctrl-C and SIGTERM delete it."""

    def __init__(self, name: str, namespace: str) -> None:
        from kubernetes import client, config

        try:
            config.load_config()
        except config.ConfigException as error:
            fix = "kubectl config use-context ..., or print it: --k8s --dry-run"
            raise UserError("there is no Kubernetes cluster to speak to", str(error), fix) from error
        self._client: Any = client
        self._name = name
        self._namespace = namespace or _namespace()
        self._core: Any = client.CoreV1Api()
        self._custom: Any = client.CustomObjectsApi()
        self._signal: signal.Signals | None = None

    def run(self, made: list[dict[str, Any]], *, detach: bool) -> int:
        """Make it, and return the exit status: of the first pod, where that is known."""
        secret, jobset = made
        where = (GROUP, VERSION, self._namespace, PLURAL)
        fix = "kubectl get crd jobsets.jobset.x-k8s.io: is JobSet installed? kubectl auth can-i create jobsets"
        try:
            kept = self._custom.create_namespaced_custom_object(*where, jobset, _request_timeout=30)
        except self._client.ApiException as error:
            raise UserError(f"JobSet {self._name} was not taken", _why(error), fix) from error
        owner = {"apiVersion": jobset["apiVersion"], "kind": "JobSet", "name": self._name}
        secret["metadata"]["ownerReferences"] = [{**owner, "uid": kept["metadata"].get("uid", "")}]
        try:
            self._core.create_namespaced_secret(self._namespace, secret, _request_timeout=30)
        except self._client.ApiException as error:
            self._delete()
            raise UserError(
                f"Secret {self._name} was not taken", _why(error), "kubectl auth can-i create secrets"
            ) from error
        pod = f"{self._name}-{REPLICATED}-0-0"
        print(
            f"distui: JobSet {self._namespace}/{self._name} is made; kubectl logs -f -l distui.run={self._name}",
            file=sys.stderr,
        )
        if detach:
            print(self._name)
            return EXIT_OK
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._stop)
        return self._follow(pod)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(signum)

    def _follow(self, pod: str, sleep: Callable[[float], None] = time.sleep) -> int:
        told = ""
        while self._signal is None:
            try:
                found = self._custom.get_namespaced_custom_object(
                    GROUP, VERSION, self._namespace, PLURAL, self._name, _request_timeout=30
                )
            except self._client.ApiException as error:
                if error.status == 404:
                    print(f"distui: JobSet {self._name} was deleted", file=sys.stderr)
                    return 128 + signal.SIGTERM
                print(f"distui: {_why(error)}; asked again", file=sys.stderr)
                sleep(LOOK_S)
                continue
            status = found.get("status") or {}
            words = _words(status)
            if words != told:
                told = words
                print(f"distui: {words}", file=sys.stderr)
            if status.get("terminalState") == "Completed":
                return EXIT_OK
            if status.get("terminalState") == "Failed":
                return self._exit_status(pod)
            sleep(LOOK_S)  # signals end it
        self._delete()
        print(f"distui: JobSet {self._name} is deleted", file=sys.stderr)
        return 128 + self._signal

    def _exit_status(self, first: str) -> int:
        """Return how the first pod's container ended; 3 where nobody can say."""
        try:
            pods = self._core.list_namespaced_pod(
                self._namespace, label_selector=f"distui.run={self._name}", _request_timeout=30
            ).items
        except self._client.ApiException:
            return EXIT_RANK_FAILED
        for pod in pods:
            if not pod.metadata.name.startswith(first):
                continue
            for container in pod.status.container_statuses or []:
                ended = container.state.terminated if container.state else None
                if ended is not None and ended.exit_code in (EXIT_USER, EXIT_RANK_FAILED):
                    return int(ended.exit_code)
        return EXIT_RANK_FAILED

    def _delete(self) -> None:
        """Delete it; its pods get SIGTERM, and its Secret goes with it."""
        try:
            self._custom.delete_namespaced_custom_object(
                GROUP,
                VERSION,
                self._namespace,
                PLURAL,
                self._name,
                propagation_policy="Foreground",
                _request_timeout=30,
            )
        except self._client.ApiException as error:
            if error.status != 404:
                print(
                    f"distui: it could not be deleted: {_why(error)}; kubectl delete jobset {self._name}",
                    file=sys.stderr,
                )


def _words(status: Mapping[str, Any]) -> str:
    jobs = (status.get("replicatedJobsStatus") or [{}])[0]
    counts = ", ".join(f"{jobs[key]} {key}" for key in ("ready", "active", "succeeded", "failed") if jobs.get(key))
    again = f", started again {status['restarts']} times" if status.get("restarts") else ""
    return f"{status.get('terminalState') or 'running'}{f' ({counts})' if counts else ''}{again}"


def _why(error: Any) -> str:
    return f"{error.status} {error.reason}: {str(error.body or '')[:300]}"


def _namespace() -> str:
    from kubernetes import config

    try:
        _, active = config.list_kube_config_contexts()
    except config.ConfigException:  # inside of a cluster
        inside = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
        return inside.read_text().strip() if inside.exists() else "default"
    return str((active.get("context") or {}).get("namespace") or "default")
