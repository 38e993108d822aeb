package mover

import (
	"context"
	"io"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/layer"
)

// LayerExtents implements image.Reader. The store may be in use as a layer that
// nobody writes.
func (m *Mover) LayerExtents(ctx context.Context, path string, size int64) ([]engine.Extent, error) {
	s, err := openSized(path, size)
	if err != nil {
		return nil, err
	}
	defer s.close()
	list, err := layer.Changed(patient{ctx, s.file()}, size)
	if ctx.Err() != nil {
		return nil, canceled(ctx, "listing of layer "+path)
	}
	return list, fault.In(err, "list what is in", "", path)
}

// patient reads until its context ends.
type patient struct {
	ctx context.Context
	io.ReaderAt
}

func (p patient) ReadAt(b []byte, off int64) (int, error) {
	if err := p.ctx.Err(); err != nil {
		return 0, err
	}
	return p.ReaderAt.ReadAt(b, off)
}

// DataExtents implements image.Reader. Space that was allocated and never
// written is no data.
func (m *Mover) DataExtents(ctx context.Context, path string, size int64) ([]engine.Extent, error) {
	s, err := openSized(path, size)
	if err != nil {
		return nil, err
	}
	defer s.close()
	x := extents{fd: s.fd, blind: s.device}
	hidden, err := x.hidden(size)
	if err != nil {
		return nil, sysErr(err, "find the holes of", path)
	}
	x.blind = x.blind || hidden
	var out []engine.Extent
	for off := int64(0); off < size; {
		if ctx.Err() != nil {
			return nil, canceled(ctx, "listing of "+path)
		}
		start, stop, err := x.next(off, size)
		if err != nil {
			return nil, sysErr(err, "find the data of", path)
		}
		if start < stop {
			out = append(out, engine.Extent{Offset: start, Length: stop - start})
		}
		off = stop
	}
	return out, nil
}

// openSized opens a slab of at least size bytes for reading.
func openSized(path string, size int64) (*store, error) {
	s, err := openSource(path)
	if err != nil {
		return nil, err
	}
	if s.size < size {
		s.close()
		return nil, fault.New(fault.Corrupt, "%q has %d bytes, %d are recorded: it was truncated", path, s.size, size)
	}
	return s, nil
}
