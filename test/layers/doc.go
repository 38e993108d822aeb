// Package layers holds tests of snapshots by layers with the real program on a real
// kernel: volumes that are written all the time while snapshots and clones of them
// come and go and layers are merged. They run in the kernel lab (docs/LAB.md).
package layers
