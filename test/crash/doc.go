// Package crash proves that nothing is lost, leaked or half visible when a
// Quarry process dies, loses replies, runs out of space or is overtaken by
// another one, at every engine call of every operation.
//
// `go test` runs a quick form of each test; with QUARRY_CRASH=long in the
// environment, as `make crash` sets it, every point is tried. In the kernel lab the
// same is tried over the engines of real servers (shares_lab_test.go).
package crash
