{{- define "quarry.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "quarry.controller" -}}{{ include "quarry.fullname" . }}-controller{{- end -}}
{{- define "quarry.node" -}}{{ include "quarry.fullname" . }}-node{{- end -}}

{{/* Labels by which pods are found, by "kubectl quarry" too. They never change: a
Deployment's selector cannot. */}}
{{- define "quarry.selector" -}}
app.kubernetes.io/name: quarry
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Those of pods. The chart's version is not one: it would replace them all. */}}
{{- define "quarry.podLabels" -}}
{{ include "quarry.selector" . }}
app.kubernetes.io/version: {{ default .Chart.AppVersion .Values.image.tag | trunc 63 | quote }}
{{- end -}}

{{- define "quarry.labels" -}}
{{ include "quarry.podLabels" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* The full name of an image: list of the root and the image's values. */}}
{{- define "quarry.image" -}}
{{- $root := index . 0 -}}{{- $image := index . 1 -}}
{{- $registry := default $image.registry $root.Values.imageRegistry -}}
{{- $name := $image.repository -}}
{{- if $registry -}}{{- $name = printf "%s/%s" (trimSuffix "/" $registry) $image.repository -}}{{- end -}}
{{- if $image.digest -}}{{ $name }}@{{ $image.digest }}
{{- else -}}{{ $name }}:{{ default $root.Chart.AppVersion $image.tag }}
{{- end -}}
{{- end -}}

{{/* "true" or nothing: does this cluster have the API, or is it said to have it? */}}
{{- define "quarry.snapshots" -}}
{{- if kindIs "bool" .Values.snapshots.enabled -}}
{{- if .Values.snapshots.enabled -}}true{{- end -}}
{{- else if .Capabilities.APIVersions.Has "snapshot.storage.k8s.io/v1" -}}true{{- end -}}
{{- end -}}

{{- define "quarry.groupSnapshots" -}}
{{- if include "quarry.snapshots" . -}}
{{- if kindIs "bool" .Values.snapshots.groups -}}
{{- if .Values.snapshots.groups -}}true{{- end -}}
{{- else if .Capabilities.APIVersions.Has "groupsnapshot.storage.k8s.io/v1" -}}true{{- end -}}
{{- end -}}
{{- end -}}

{{/* Where secrets of domains are mounted. */}}
{{- define "quarry.secretsDir" -}}/run/secrets/quarry-domains{{- end -}}

{{/* The domains file: the values as they stand, with the places of secrets added. */}}
{{- define "quarry.domains" -}}
{{- $entries := list -}}
{{- range .Values.domains -}}
{{- $entry := deepCopy . -}}
{{- if hasKey $.Values.secrets .name -}}
{{- $_ := set $entry "secretsFile" (printf "%s/%s/%s" (include "quarry.secretsDir" $) .name (default "secrets.yaml" (index $.Values.secrets .name).key)) -}}
{{- end -}}
{{- $entries = append $entries $entry -}}
{{- end -}}
{{- toYaml (dict "domains" $entries) -}}
{{- end -}}

{{/* JSON list of the directories of domains, and of sockets, that are mounted by themselves:
all that are not below node.dataDir. */}}
{{- define "quarry.directories" -}}
{{- $base := printf "%s/" (trimSuffix "/" .Values.node.dataDir) -}}
{{- $paths := list -}}
{{- range .Values.domains -}}
{{- if or .socket (has (default "" .engine) (list "dir" "sharedfs")) -}}
{{- $path := clean (default "" (index (default dict .params) "path")) -}}
{{- if .socket -}}{{- $path = dir (clean .socket) -}}{{- end -}}
{{- if not (hasPrefix $base (printf "%s/" $path)) -}}{{- $paths = append $paths $path -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- $paths | uniq | sortAlpha | toJson -}}
{{- end -}}

{{- define "quarry.usesLVM" -}}
{{- range .Values.domains -}}{{- if and (not .socket) (eq (default "" .engine) "lvm") -}}true{{- end -}}{{- end -}}
{{- end -}}

{{/* "true" or nothing: what the kernel mounts over the network belongs to the network of who mounts
it, and pods go on to use it when the agent's pod has gone. */}}
{{- define "quarry.hostNetwork" -}}
{{- if kindIs "bool" .Values.node.hostNetwork -}}
{{- if .Values.node.hostNetwork -}}true{{- end -}}
{{- else -}}
{{- $mounts := false -}}
{{- range .Values.domains -}}{{- if and (not .socket) (has (default "" .engine) (list "nfs3" "nfs4" "smb" "gluster")) -}}{{- $mounts = true -}}{{- end -}}{{- end -}}
{{- if $mounts -}}true{{- end -}}
{{- end -}}
{{- end -}}

{{- define "quarry.usesGluster" -}}
{{- range .Values.domains -}}{{- if and (not .socket) (eq (default "" .engine) "gluster") -}}true{{- end -}}{{- end -}}
{{- end -}}

{{- define "quarry.tlsSecret" -}}{{ default (printf "%s-tls" (include "quarry.controller" .)) .Values.tls.secret }}{{- end -}}

{{/* "true": the controller makes its certificate itself. */}}
{{- define "quarry.ownTLS" -}}
{{- if not (or .Values.tls.secret .Values.tls.certManager.enabled) -}}true{{- end -}}
{{- end -}}

{{- define "quarry.controllerHost" -}}{{ include "quarry.controller" . }}.{{ .Release.Namespace }}.svc{{- end -}}

{{/* What a container of the controller's pod may do: nothing. */}}
{{- define "quarry.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Values that contradict each other: said here, in words, before anything is sent. */}}
{{- define "quarry.check" -}}
{{- $names := list -}}
{{- range .Values.domains -}}
{{- if has .name $names -}}{{- fail (printf "domains: %q is the name or an alias of two domains" .name) -}}{{- end -}}
{{- $names = append $names .name -}}
{{- range .aliases -}}
{{- if has . $names -}}{{- fail (printf "domains: %q is the name or an alias of two domains" .) -}}{{- end -}}
{{- $names = append $names . -}}
{{- end -}}
{{- if and (not .socket) (has (default "" .engine) (list "dir" "sharedfs")) (not (index (default dict .params) "path")) -}}
{{- fail (printf "domains: %q: engine %s needs params.path, the directory on each node" .name .engine) -}}
{{- end -}}
{{- if and .secretsFile (hasKey $.Values.secrets .name) -}}
{{- fail (printf "domains: %q has a secretsFile and stands in secrets as well: leave out secretsFile, the chart sets it" .name) -}}
{{- end -}}
{{- end -}}
{{- range $name, $secret := .Values.secrets -}}
{{- $known := list -}}{{- range $.Values.domains -}}{{- $known = append $known .name -}}{{- end -}}
{{- if not (has $name $known) -}}{{- fail (printf "secrets: there is no domain %q: the domains are %s" $name (join ", " $known)) -}}{{- end -}}
{{- end -}}
{{- $classes := list -}}
{{- range .Values.classes -}}
{{- if has .name $classes -}}{{- fail (printf "classes: %q stands there twice" .name) -}}{{- end -}}
{{- $classes = append $classes .name -}}
{{- $parameters := default dict .parameters -}}
{{- if and (eq (default "" $parameters.layout) "directory") .fstype -}}
{{- fail (printf "classes: %q: a directory has no filesystem of its own: leave out fstype, or layout: directory" .name) -}}
{{- end -}}
{{- if hasKey $parameters "csi.storage.k8s.io/fstype" -}}
{{- fail (printf "classes: %q: the filesystem is said by fstype, not by parameters" .name) -}}
{{- end -}}
{{- range (concat (ternary (list $parameters.domain) list (hasKey $parameters "domain")) (splitList "," (default "" $parameters.domains))) -}}
{{- $wanted := trim . -}}
{{- if and $wanted (not (has (first (splitList "." $wanted)) $names)) -}}
{{- fail (printf "classes: there is no domain %q, which a class names: the domains are %s" $wanted (join ", " $names)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.tls.secret .Values.tls.certManager.enabled -}}
{{- fail "tls.secret and tls.certManager.enabled exclude each other: cert-manager makes its own secret" -}}
{{- end -}}
{{- if and .Values.snapshotMetadata.enabled (not (and .Values.snapshotMetadata.tlsSecret .Values.snapshotMetadata.caBundle)) -}}
{{- fail "snapshotMetadata.enabled needs tlsSecret, a kubernetes.io/tls secret for its service, and caBundle, the PEM text that backup programs know it by" -}}
{{- end -}}
{{- end -}}
