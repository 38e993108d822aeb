// Package docs runs what docs/ tells people to run, on a cluster of its own: pages are read, and their
// commands are run in their order, as they stand. hack/e2e docs brings the cluster up and takes it down.
package docs
