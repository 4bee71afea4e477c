{{- define "whalepod.check.cluster" -}}
{{- $v := (index . 0).Values -}}
{{- $plan := index . 1 -}}
{{- $t := $v.termination -}}
{{- if lt (int $t.graceSeconds) (add (int $t.drainSeconds) 30 | int) }}{{ fail (printf "\n\ntermination.graceSeconds is %d; Kubernetes would kill a node that still drains: it needs drainSeconds + 30 = %d" (int $t.graceSeconds) (add (int $t.drainSeconds) 30 | int)) }}{{ end -}}
{{- if le (float64 $t.drainSeconds) (float64 $v.config.cluster.drain_s) }}{{ fail (printf "\n\ntermination.drainSeconds is %d; members may finish requests for config.cluster.drain_s=%v and then need time to leave: raise it above that" (int $t.drainSeconds) $v.config.cluster.drain_s) }}{{ end -}}
{{- if and (eq $v.kind "RayService") (eq $v.upgradeStrategy "Recreate") }}{{ fail "\n\nupgradeStrategy is Recreate, which KubeRay has for kind=RayCluster only; use None or NewCluster" }}{{ end -}}
{{- if and (eq $v.kind "RayCluster") (eq $v.upgradeStrategy "NewCluster") }}{{ fail "\n\nupgradeStrategy is NewCluster, which KubeRay has for kind=RayService only; use None or Recreate" }}{{ end -}}
{{- if and $v.gcsFaultTolerance.enabled (not $v.gcsFaultTolerance.redisAddress) }}{{ fail "\n\ngcsFaultTolerance.redisAddress is empty; name the Redis that keeps the cluster's state, as redis:6379" }}{{ end -}}
{{- if and $v.gcsFaultTolerance.redisUsername (not $v.gcsFaultTolerance.passwordSecretName) }}{{ fail "\n\ngcsFaultTolerance.redisUsername is set without passwordSecretName; name the Secret with the user's password" }}{{ end -}}
{{- if and (eq $v.auth.ray.mode "disabled") (not $v.networkPolicy.enabled) }}{{ fail "\n\nauth.ray.mode=disabled with networkPolicy.enabled=false: Ray would run code for whoever reaches it; enable one of them" }}{{ end -}}
{{- range $role, $g := $plan.groups -}}
{{- $own := index $v.groups $role -}}
{{- if gt (int $g.min) (int $g.max) }}{{ fail (printf "\n\ngroups.%s: minReplicas %d is above maxReplicas %d" $role (int $g.min) (int $g.max)) }}{{ end -}}
{{- if or (lt (int $g.replicas) (int $g.min)) (gt (int $g.replicas) (int $g.max)) }}{{ fail (printf "\n\ngroups.%s: replicas %d is not between minReplicas %d and maxReplicas %d" $role (int $g.replicas) (int $g.min) (int $g.max)) }}{{ end -}}
{{- if and (not $v.autoscaling.enabled) (or $own.minReplicas $own.maxReplicas) }}{{ fail (printf "\n\ngroups.%s: minReplicas and maxReplicas need autoscaling.enabled=true; without it set replicas" $role) }}{{ end -}}
{{- end -}}
{{- if and (not $plan.gpus) $v.fabric.rdma.enabled }}{{ fail "\n\nfabric.rdma.enabled=true, but no group has GPUs; RDMA serves nccl between GPU pods" }}{{ end -}}
{{- if and (not $plan.gpus) (ne $v.fabric.nvlinkDomain.mode "none") }}{{ fail (printf "\n\nfabric.nvlinkDomain.mode=%s, but no group has GPUs" $v.fabric.nvlinkDomain.mode) }}{{ end -}}
{{- if and (not $plan.gpus) $v.fabric.ncclEnv }}{{ fail "\n\nfabric.ncclEnv is set, but no group has GPUs; gloo reads none of it" }}{{ end -}}
{{- if and (eq $v.gang.scheduler "none") (or $v.gang.queue $v.gang.priorityClassName) }}{{ fail "\n\ngang.queue or gang.priorityClassName is set without gang.scheduler; name the scheduler KubeRay is set up for" }}{{ end -}}
{{- if not $v.securityContext.capabilities }}{{ fail "\n\nsecurityContext.capabilities is missing; keep `drop: [ALL]`" }}{{ end -}}
{{- if not $v.podSecurityContext.runAsNonRoot }}{{ fail "\n\npodSecurityContext.runAsNonRoot must be true; the image runs as user 1000" }}{{ end -}}
{{- end -}}

{{- define "whalepod.check.network" -}}
{{- $v := (index . 0).Values -}}
{{- $s := $v.config.server -}}
{{- $taken := list 6379 8080 8265 10001 52365 6380 6381 6382 6383 -}}
{{- range $key, $port := dict "http_port" $s.http_port "grpc_port" $s.grpc_port -}}
{{- if or (has (int $port) $taken) (and (ge (int $port) 10002) (le (int $port) 19999)) }}{{ fail (printf "\n\nconfig.server.%s is %d, which Ray uses itself; choose another, as 8000 and 9000 are" $key (int $port)) }}{{ end -}}
{{- end -}}
{{- if eq (int $s.http_port) (int $s.grpc_port) }}{{ fail (printf "\n\nconfig.server.http_port and grpc_port are both %d; they need one each" (int $s.http_port)) }}{{ end -}}
{{- $routes := or $v.gateway.httpRoute.enabled $v.gateway.grpcRoute.enabled -}}
{{- if and $routes (not $v.gateway.parentRefs) }}{{ fail "\n\ngateway.parentRefs is empty; name the Gateway that the routes belong to, as [{name: ..., namespace: ...}]" }}{{ end -}}
{{- if and $v.networkPolicy.enabled (or $routes $v.ingress.enabled $v.ingress.grpc.enabled) (not $v.networkPolicy.clients) }}{{ fail "\n\nnetworkPolicy.clients is empty, so the gateway could not reach the ingress pods; name it, as [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: NAMESPACE}}}]" }}{{ end -}}
{{- if and $v.networkPolicy.enabled (or $v.monitoring.serviceMonitor.enabled $v.monitoring.podMonitor.enabled) (not $v.networkPolicy.monitoring) }}{{ fail "\n\nnetworkPolicy.monitoring is empty, so Prometheus could not read metrics; name its namespace" }}{{ end -}}
{{- if and $v.ingress.enabled (not $v.ingress.host) }}{{ fail "\n\ningress.host is empty; name the host that clients use" }}{{ end -}}
{{- if and $v.ingress.grpc.enabled (not $v.ingress.grpc.host) }}{{ fail "\n\ningress.grpc.host is empty; gRPC needs a host of its own" }}{{ end -}}
{{- if and $v.ingress.grpc.enabled (not $v.ingress.tlsSecretName) }}{{ fail "\n\ningress.tlsSecretName is empty; Ingress controllers speak gRPC over TLS only" }}{{ end -}}
{{- if gt (int $v.networkPolicy.ephemeralFrom) (int $v.networkPolicy.ephemeralTo) }}{{ fail (printf "\n\nnetworkPolicy.ephemeralFrom %d is above ephemeralTo %d" (int $v.networkPolicy.ephemeralFrom) (int $v.networkPolicy.ephemeralTo)) }}{{ end -}}
{{- end -}}
