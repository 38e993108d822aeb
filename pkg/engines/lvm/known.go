package lvm

import (
	"context"
	"sync"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/lvm"
)

// knowledge is what the group held at one commit of its metadata. It is the truth
// for as long as the disks say that nothing was committed since, which a few
// direct reads find out: a listing then starts no program. The Image Manager
// lists after each tag that it makes.
type knowledge struct {
	// changing has room for one whose change can be followed: one commit each. The
	// others wait.
	changing chan struct{}

	mu      sync.Mutex
	commit  lvm.Commit // the zero one: nothing is known
	volumes map[string]lvm.Volume
	info    *lvm.Info // nil: not known
}

// recordBytes is what a volume takes of the metadata beside its LVM tags, roughly.
const recordBytes = 400

func textSize(v lvm.Volume) int64 {
	n := int64(recordBytes)
	for _, t := range v.Tags {
		n += int64(len(t)) + 4
	}
	return n
}

// now is the group's commit at this moment; false: only the programs can tell.
func (e *lvmEngine) now(ctx context.Context) (lvm.Commit, bool) {
	c, err := e.group.Commit(ctx, e.uuid, e.disks)
	return c, err == nil
}

// ours are the volumes that are the domain's, and that keep wants.
func (e *lvmEngine) ours(ctx context.Context, keep func(name string) bool) ([]lvm.Volume, error) {
	before, ok := e.now(ctx)
	if ok {
		if all, ok := e.known.at(before, keep); ok {
			return all, nil
		}
	}
	l, err := e.list(ctx, lvm.Names([]string{marker}, []string{tagSort + ".", tagSort + "-", slabs + ".", slabs + "-", partial + ".", partial + "-"}), false)
	if err != nil {
		return nil, err
	}
	if after, still := e.now(ctx); ok && still && before == after && l.Seqno == after.Seqno && !e.grown.Load() {
		e.known.learn(after, l.Volumes)
	}
	var out []lvm.Volume
	for _, v := range l.Volumes {
		if keep(v.Name) {
			out = append(out, v)
		}
	}
	return out, nil
}

func (k *knowledge) at(c lvm.Commit, keep func(name string) bool) ([]lvm.Volume, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.commit != c || k.volumes == nil {
		return nil, false
	}
	var out []lvm.Volume
	for name, v := range k.volumes {
		if keep(name) {
			out = append(out, v)
		}
	}
	return out, true
}

func (k *knowledge) learn(c lvm.Commit, all []lvm.Volume) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.commit != c {
		k.info = nil
	}
	k.commit, k.volumes = c, make(map[string]lvm.Volume, len(all))
	for _, v := range all {
		k.volumes[v.Name] = v
	}
}

// follow makes a change, and what is known of it known: add is a volume that it
// makes, remove are those that it removes. If the group was as it is known right
// before, and is one commit further then, that was the change and nothing else.
// The error is that of the change, or says that the caller gave up waiting for
// another's change to end.
func (e *lvmEngine) follow(ctx context.Context, change func() error, add *lvm.Volume, remove ...string) error {
	k := &e.known
	select {
	case k.changing <- struct{}{}:
		defer func() { <-k.changing }()
	case <-ctx.Done():
		return fault.New(fault.KindOf(ctx.Err()), "volume group %s: another change is still being made: %w", e.name, ctx.Err())
	}
	k.mu.Lock()
	had := k.commit
	k.mu.Unlock()
	// The number alone does not tell: a backup that was restored may have brought
	// the known one back, with something else behind it.
	before, ok := e.now(ctx)
	if err := change(); err != nil {
		return err
	}
	after, still := e.now(context.WithoutCancel(ctx))
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case still && after == had: // the change is not to be seen: this does not tell states apart
		k.commit, k.volumes, k.info = lvm.Commit{}, nil, nil
		return nil
	case !ok || !still || before != had || after.Seqno != before.Seqno+1:
		return nil
	case k.commit != had || k.volumes == nil: // learned from a program meanwhile
		return nil
	}
	var space, text int64
	if add != nil {
		k.volumes[add.Name] = *add
		space, text = space-e.space(*add), text-textSize(*add)
	}
	for _, name := range remove {
		if v, there := k.volumes[name]; there {
			delete(k.volumes, name)
			space, text = space+e.space(v), text+textSize(v)
		}
	}
	k.commit = after
	e.room.Add(text)
	if k.info != nil {
		k.info.Seqno = after.Seqno
		k.info.Free += space
		k.info.MetadataFree += text
	}
	return nil
}

// space is what a volume takes of the group's extents.
func (e *lvmEngine) space(v lvm.Volume) int64 {
	if v.Pool != "" || !slabName(v.Name) {
		return 0
	}
	return v.Size
}

// info is the group's.
func (e *lvmEngine) info(ctx context.Context) (lvm.Info, error) {
	k := &e.known
	before, ok := e.now(ctx)
	if ok {
		k.mu.Lock()
		if k.commit == before && k.info != nil {
			defer k.mu.Unlock()
			return *k.info, nil
		}
		k.mu.Unlock()
	}
	info, err := e.group.Info(ctx)
	if err != nil {
		return info, err
	}
	e.room.Store(info.MetadataFree)
	if after, still := e.now(ctx); ok && still && before == after && info.Seqno == after.Seqno {
		k.mu.Lock()
		defer k.mu.Unlock()
		if k.commit == after {
			k.info = &info
		}
	}
	return info, nil
}
