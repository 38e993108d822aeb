// Package behaviour holds tests of the real programs, quarry standalone and
// kubectl-quarry, over their sockets and on real file systems: what bad input,
// damage and full disks get, what a snapshot of a volume in use holds, how
// volumes grow, and what a killed process leaves. They need root.
package behaviour
