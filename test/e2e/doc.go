// Package e2e holds Quarry's own scenarios on a real Kubernetes, as users run it: claims, pods,
// snapshots and faults, through the API only. hack/e2e brings the cluster up, installs the
// chart with values.yaml and runs them; "make e2e" runs that, and the upstream suite.
//
// $KUBECONFIG names the cluster. The faults need hack/cluster, which $QUARRY_CLUSTER_COMMAND names.
package e2e
