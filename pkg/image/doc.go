// Package image is the Image Manager: it does all image work (create, clone,
// snapshot, grow, delete, collect, check) once, correctly, for every storage.
//
// Everything it knows lies in tags in the domains; the index in memory is read
// from them at opening. An operation is an intent (a weak tag), work on slabs,
// and a seal (a strong tag): before the seal nothing happened, after it
// everything did. There is no other journal. The file record.go has the
// formats, domain.go the commit protocol, fill.go the choice between the
// storage's own ways and the defaults, collector.go what is removed and when.
package image
