// Package python checks the reference engine of docs/examples/engine-python, by the commands of
// docs/ENGINES.md and by what the conformance suite cannot do to it: full disks, and its
// end at any moment.
package python
