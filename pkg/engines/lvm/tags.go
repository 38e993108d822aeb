package lvm

import (
	"bytes"
	"context"
	"errors"
	"strings"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/lvm"
)

// CreateTag implements engine.Engine. One lvcreate makes the volume and its LVM
// tags, or nothing.
func (e *lvmEngine) CreateTag(ctx context.Context, tag engine.Tag) error {
	if err := engine.CheckTag(tag); err != nil {
		return err
	}
	lv := volume(tagSort, tag.Name)
	lvmTags := encodeTag(tag)
	err := e.follow(ctx, func() error { return e.group.CreateRecord(ctx, lv, lvmTags...) },
		&lvm.Volume{Name: lv, Size: e.extent, Tags: lvmTags, Used: -1})
	if !errors.Is(err, fault.Exists) {
		return err
	}
	volumes, err := e.ours(ctx, func(name string) bool { return name == lv })
	if err != nil {
		return err
	}
	if len(volumes) == 0 {
		return fault.New(fault.Exists, "tag %q was taken, and was deleted meanwhile", tag.Name)
	}
	have, ok := decodeTag(volumes[0])
	switch {
	case !ok || have.Name != tag.Name || have.Record == nil:
		return fault.New(fault.Exists, "tag %q is taken by something that cannot be read as a tag: logical volume %s/%s", tag.Name, e.name, lv)
	case have.Slab != tag.Slab || !bytes.Equal(have.Record, tag.Record):
		return fault.New(fault.Exists, "tag %q is taken by another record", tag.Name)
	}
	return nil // a lost reply
}

// DeleteTag implements engine.Engine.
func (e *lvmEngine) DeleteTag(ctx context.Context, name string) error {
	if err := engine.CheckName("tag name", name); err != nil {
		return err
	}
	lv := volume(tagSort, name)
	err := e.follow(ctx, func() error { return e.group.RemoveRecord(ctx, e.uuid, lv) }, nil, lv)
	if errors.Is(err, fault.NotFound) {
		return e.confirm(ctx)
	}
	return err
}

// ListTags implements engine.Engine: what the group had at one moment.
func (e *lvmEngine) ListTags(ctx context.Context, prefix string) ([]engine.Tag, error) {
	if strings.Trim(prefix, "abcdefghijklmnopqrstuvwxyz0123456789._-") != "" {
		return nil, nil // nothing begins like that
	}
	plain := tagSort + "." + prefix
	volumes, err := e.ours(ctx, func(name string) bool { // what is hashed can only be looked at
		return strings.HasPrefix(name, plain) || strings.HasPrefix(name, tagSort+"-")
	})
	if err != nil {
		return nil, err
	}
	tags := make([]engine.Tag, 0, len(volumes))
	for _, v := range volumes {
		if tag, ok := decodeTag(v); ok && strings.HasPrefix(tag.Name, prefix) {
			tags = append(tags, tag)
		}
	}
	return tags, nil
}
