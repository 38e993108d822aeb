package dir

import (
	"context"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// Importable implements engine.Importer, for a file in the domain's folder import/.
func (e *dirEngine) Importable(ctx context.Context, source string) (engine.Importable, error) {
	f, st, err := e.OpenImport(source)
	if err != nil {
		return engine.Importable{}, err
	}
	path := f.Name()
	if err := f.Close(); err != nil {
		return engine.Importable{}, err
	}
	loops, err := e.host.Loops(ctx, func(l host.Loop) bool { return l.Dev == st.Dev && l.Inode == st.Ino })
	if err != nil {
		return engine.Importable{}, err
	}
	if len(loops) > 0 { // one that only reads is not seen by a lease
		return engine.Importable{}, fault.New(fault.InUse, "%s has the loop device %s: end its use first (losetup --detach)", path, loops[0].Path)
	}
	sig, err := e.host.Probe(ctx, path)
	if err != nil {
		return engine.Importable{}, err
	}
	return engine.Importable{Size: st.Size, Allocated: st.Blocks * 512, Holds: sig.String()}, nil
}

var _ engine.Importer = (*dirEngine)(nil)
