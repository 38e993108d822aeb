package mover

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// A copy between two hosts is a stream of frames, one way. Each has a head of 17 bytes:
// its kind, an offset and a length, both big-endian; data and entries have so many bytes
// after it. What is sent of a block slab or a file is contiguous: each frame begins where
// the one before has ended, and wireEnd says that nothing is missing.
type wireKind byte

const (
	wireData  wireKind = 'd'
	wireHole  wireKind = 'h' // length bytes that read as zero
	wireEnd   wireKind = 'e' // of the content: offset is its size
	wireEntry wireKind = 'n' // a name in a tree, as JSON: see wireNode
	wireAgain wireKind = 'a' // the file has changed: its content comes once more; a wireNode
	wireLeave wireKind = 'l' // the directory is complete
)

// maxEntry is how long an entry may be: names and attributes have 64 KiB each at most.
const maxEntry = 16 << 20

// wireHead is the head of a frame.
type wireHead struct {
	kind   wireKind
	off, n int64
}

// wireWriter writes frames.
type wireWriter struct{ w *bufio.Writer }

func newWireWriter(w io.Writer) *wireWriter { return &wireWriter{bufio.NewWriterSize(w, 64<<10)} }

func (w *wireWriter) frame(h wireHead, body []byte) error {
	b := append(make([]byte, 0, 17), byte(h.kind))
	b = binary.BigEndian.AppendUint64(b, uint64(h.off))
	b = binary.BigEndian.AppendUint64(b, uint64(h.n))
	_, err := w.w.Write(b)
	if err == nil {
		_, err = w.w.Write(body)
	}
	return hungUp(err)
}

func (w *wireWriter) data(off int64, body []byte) error {
	return w.frame(wireHead{wireData, off, int64(len(body))}, body)
}

func (w *wireWriter) hole(off, n int64) error {
	if n == 0 {
		return nil
	}
	return w.frame(wireHead{wireHole, off, n}, nil)
}

func (w *wireWriter) entry(kind wireKind, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fault.Wrap(fault.Internal, err)
	}
	return w.frame(wireHead{kind, 0, int64(len(b))}, b)
}

func (w *wireWriter) flush() error { return hungUp(w.w.Flush()) }

// hungUp is the error of a connection.
func hungUp(err error) error {
	if err == nil {
		return nil
	}
	return fault.New(fault.Unavailable, "the connection between the two nodes of a copy: %w", err)
}

// wireReader reads frames.
type wireReader struct{ r *bufio.Reader }

func newWireReader(r io.Reader) *wireReader { return &wireReader{bufio.NewReaderSize(r, 64<<10)} }

func (r *wireReader) head() (h wireHead, err error) {
	var b [17]byte
	if _, err := io.ReadFull(r.r, b[:]); err != nil {
		if errors.Is(err, io.EOF) {
			err = errors.New("the other node has ended it before everything had come")
		}
		return h, hungUp(err)
	}
	h = wireHead{wireKind(b[0]), int64(binary.BigEndian.Uint64(b[1:])), int64(binary.BigEndian.Uint64(b[9:]))}
	if h.off < 0 || h.n < 0 {
		return h, garbled("a frame of %d bytes at %d", h.n, h.off)
	}
	return h, nil
}

func (r *wireReader) body(b []byte) error {
	_, err := io.ReadFull(r.r, b)
	return hungUp(err)
}

func (r *wireReader) entry(h wireHead, v any) error {
	if h.n > maxEntry {
		return garbled("an entry of %d bytes", h.n)
	}
	b := make([]byte, h.n)
	if err := r.body(b); err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return garbled("%v", err)
	}
	return nil
}

// garbled is what no Quarry sends.
func garbled(format string, args ...any) error {
	return fault.New(fault.Internal, "the other node of a copy sends what cannot be: "+format, args...)
}
