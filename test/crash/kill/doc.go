// Package kill proves that what Quarry acknowledged survives kill -9: the real
// binary runs with two domains on real file systems, several workers drive it
// over its CSI socket and write to its volumes all the time, and it is killed at
// random moments, while it starts too, and started again. After each start what
// it lists is compared with what it had acknowledged, and the bytes of every
// volume and snapshot with what was written and when.
//
// `go test` kills 10 times. Environment:
//
//	QUARRY_KILLS    how often it is killed
//	QUARRY_SEED     repeats the decisions of an earlier run
package kill
