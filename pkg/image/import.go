package image

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// ImportRequest asks for a volume of what lies in a domain's storage beside its slabs.
type ImportRequest struct {
	Name   string // the volume's
	Domain string // name or ID
	// Source is a name that the engine has for such things: a file in the domain's folder
	// import/, a logical volume.
	Source string
	// Block: the volume is used raw, whatever it holds. Otherwise it carries Filesystem,
	// or what is found.
	Block      bool
	Filesystem string
	Described  Described
	// DryRun: look only.
	DryRun bool
}

// Import makes a volume of what is there already. No bytes move, and until the volume's
// seal it stays under its own name as well, or goes back there. It is idempotent by name.
// fault.Unsupported: the storage imports nothing. fault.Exists: the name is that of another volume.
// fault.NotFound, fault.InUse, fault.Invalid: as the source is. In a dry run the
// image is as it would become, without a handle.
func (m *Manager) Import(ctx context.Context, r ImportRequest) (Image, error) {
	if err := checkName("volume", r.Name); err != nil {
		return Image{}, err
	}
	if r.Block && r.Filesystem != "" {
		return Image{}, fault.New(fault.Invalid, "a raw block volume has no filesystem: leave %q out", r.Filesystem)
	}
	if r.Filesystem != "" && !slices.Contains(Filesystems(), r.Filesystem) {
		return Image{}, fault.New(fault.Invalid, "filesystem %q is unknown: one of %s", r.Filesystem, strings.Join(Filesystems(), ", "))
	}
	d, err := m.oneDomain(r.Domain)
	if err != nil {
		return Image{}, err
	}
	if d.caps.Importer == nil {
		return Image{}, fault.New(fault.Unsupported, "domain %s: engine %s imports nothing", d.id, d.cfg.Engine)
	}
	if r.DryRun {
		if img := m.byName(spaceVolume, r.Name); img != nil {
			return Image{}, fault.New(fault.Exists, "a volume %q exists: %s", r.Name, img.d.handle(img))
		}
		_, rec, err := d.importable(ctx, r)
		return Image{Name: r.Name, Layout: LayoutImage, Mutable: true, Size: rec.Size, Filesystem: rec.FS, Handle: Handle{Domain: d.id}}, err
	}
	asked := fingerprint(d.id, r.Source, r.Block, r.Filesystem)
	return do(ctx, m, spaceVolume+"/"+r.Name, "import volume", r.Name, asked, func(ctx context.Context, op *operation) (Image, error) {
		return m.importVolume(ctx, op, d, r)
	})
}

// oneDomain finds the one open domain of a name or an ID.
func (m *Manager) oneDomain(said string) (*domain, error) {
	if d, err := m.domain(said); err == nil {
		return d, nil
	}
	var found []*domain
	var ids []string
	for _, d := range m.open() {
		if d.named(said) {
			found = append(found, d)
			ids = append(ids, d.id)
		}
	}
	switch len(found) {
	case 0:
		_, err := m.domain(said)
		return nil, err
	case 1:
		return found[0], nil
	}
	return nil, fault.New(fault.Invalid, "domain %q is one of each node: say which: %s", said, strings.Join(ids, ", "))
}

// importable looks at a source and says what record its volume would have.
func (d *domain) importable(ctx context.Context, r ImportRequest) (engine.Importable, record, error) {
	found, err := d.caps.Importer.Importable(ctx, r.Source)
	if err != nil {
		return found, record{}, err
	}
	if unit := d.unit(LayoutImage, 0)(found.Size); found.Size%unit != 0 {
		size := (found.Size/unit + 1) * unit
		return found, record{}, fault.New(fault.Invalid, "%s has %d bytes: a volume of about that size has a multiple of %d: grow it to %d first", r.Source, found.Size, unit, size)
	}
	rec := record{Name: r.Name, Kind: string(engine.Block), Mutable: true, Op: opCreate, Size: found.Size, Created: d.m.cfg.Now().UnixMilli(), Used: true}
	if r.Block {
		return found, rec, nil
	}
	// Its UUID may be that of the volume that it was copied from, on the same node.
	rec.FS, rec.Cloned = cmp.Or(r.Filesystem, found.Holds), true
	switch {
	case rec.FS != found.Holds:
		return found, record{}, fault.New(fault.Invalid, "%s holds %s, not %s", r.Source, found.Holds, rec.FS)
	case !slices.Contains(Filesystems(), rec.FS):
		return found, record{}, fault.New(fault.Invalid, "%s holds %s, not a filesystem that a volume can carry (%s): import it as a raw block volume, or import one that does", r.Source, found.Holds, strings.Join(Filesystems(), ", "))
	}
	return found, rec, nil
}

func importedHow(source string) how { return how{native: true, reason: "import of " + source} }

func (m *Manager) importVolume(ctx context.Context, op *operation, d *domain, r ImportRequest) (Image, error) {
	op.at(d.id, "")
	if img := m.byName(spaceVolume, r.Name); img != nil {
		if done, err := m.existingImport(ctx, op, d, img, r); done || err != nil {
			return m.view(img), err
		}
	}
	if err := m.allOpen(d.cfg.Name); err != nil {
		return Image{}, err // the name may be taken where nobody can look, as for a new volume
	}
	op.stepf("looking at %s", r.Source)
	found, rec, err := d.importable(ctx, r)
	if err != nil {
		return Image{}, err
	}
	release, err := d.reserve(ctx, max(0, found.Size-found.Allocated)) // the rest is taken already
	if err != nil {
		return Image{}, err
	}
	defer release()
	img, err := d.intend(ctx, op, rec, "")
	if err != nil {
		return Image{}, err
	}
	release()
	if err := d.takeIn(ctx, op, img, rec, r); err != nil {
		if err := d.abandon(ctx, img, err); err != nil { // its slab goes back to where it was
			return Image{}, err
		}
	}
	m.tellCreated(img)
	return m.view(img), d.keep(ctx, r.Source, img)
}

// takeIn makes the source an image's slab, and seals the image.
func (d *domain) takeIn(ctx context.Context, op *operation, img *image, rec record, r ImportRequest) error {
	op.stepf("importing %s", r.Source)
	if err := d.describe(ctx, img, r.Described); err != nil {
		return err
	}
	if err := d.caps.Importer.ImportSlab(ctx, r.Source, engine.SlabSpec{ID: img.id, Kind: engine.Block, Size: rec.Size}); err != nil {
		return err
	}
	h := importedHow(r.Source)
	rec.Strong, rec.Op, rec.How = true, "", h.String()
	op.took(h)
	op.stepf("sealing")
	return d.commit(ctx, img, rec, img.id)
}

// keep makes the import of a sealed image final.
func (d *domain) keep(ctx context.Context, source string, img *image) error {
	if err := d.current(ctx); err != nil {
		return err
	}
	if err := d.caps.Importer.KeepSlab(ctx, source, img.id); err != nil {
		return fault.New(fault.Unavailable, "%s is volume %s now, and has its old name as well: do not use that, and ask again: %w", source, d.handle(img), err)
	}
	return nil
}

// existingImport deals with a volume that has the name already: done says that it is this import.
func (m *Manager) existingImport(ctx context.Context, op *operation, d *domain, img *image, r ImportRequest) (done bool, err error) {
	release, err := img.hold(ctx, op)
	if err != nil {
		return false, err
	}
	defer release()
	rec, _ := img.snapshot()
	switch {
	case rec.dead():
		return false, nil
	case !rec.Strong: // half made by an earlier run
		return false, img.d.sweep(ctx, img)
	case img.d != d || rec.How != importedHow(r.Source).String():
		return false, fault.New(fault.Exists, "a volume %q exists that is not this import: %s", r.Name, img.d.handle(img))
	}
	if err := img.usable(); err != nil && !errors.Is(err, fault.NotFound) {
		return false, err
	}
	return true, d.keep(ctx, r.Source, img)
}
