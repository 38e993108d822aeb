// Package sanity runs the CSI project's own acceptance suite (csi-test) against
// the real quarry binary, on every file system and for every kind of access.
// Every spec must pass, and none may be skipped but those that cannot apply.
package sanity
