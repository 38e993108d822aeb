package main

import (
	"context"
	"fmt"
	"strings"
	"unicode"

	"github.com/quarry-csi/quarry/pkg/block"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/layer"
	"github.com/quarry-csi/quarry/pkg/mover"
)

// domain makes slabs by an engine, and devices of them.
type domain struct {
	name    string
	engine  engine.Engine
	devices *block.Devices
	below   []block.Slab // layers that tops are put over, and last the base
}

func newDomain(name string, e engine.Engine) *domain {
	return &domain{name: name, engine: e, devices: &block.Devices{Host: host.NewLocal(host.Exec{})}}
}

// raw makes a slab full of data.
func (d *domain) raw(ctx context.Context, id string) (block.Slab, error) {
	s, err := d.slab(ctx, id, size)
	if err != nil {
		return s, err
	}
	return s, fill(s.Path)
}

func (d *domain) slab(ctx context.Context, id string, bytes int64) (block.Slab, error) {
	if err := d.engine.CreateSlab(ctx, engine.SlabSpec{ID: id, Kind: engine.Block, Size: bytes}); err != nil {
		return block.Slab{}, err
	}
	a, err := d.engine.AttachSlab(ctx, id, engine.AttachOptions{})
	return block.Slab{ID: d.name + "/" + id, Path: a.Path, Size: size}, err
}

// layer makes an empty one as the Image Manager does, all its space allocated.
func (d *domain) layer(ctx context.Context, id string, chunk int64) (block.Slab, error) {
	store := layer.StoreSize(size, chunk)
	s, err := d.slab(ctx, id, store)
	if err != nil {
		return s, err
	}
	s.Chunk = chunk
	return s, mover.New(mover.Options{}).FormatLayer(ctx, s.Path, store, chunk)
}

func (d *domain) attach(ctx context.Context, id string, slabs []block.Slab) (block.Device, error) {
	return d.devices.Attach(ctx, block.Spec{Owner: d.name + "/" + id, Use: block.Raw, Slabs: slabs, Size: size})
}

// build makes the base and layers over it that have some data each.
func (d *domain) build(ctx context.Context, layers int, chunk int64) error {
	base, err := d.raw(ctx, "base")
	d.below = []block.Slab{base}
	for i := 1; i <= layers && err == nil; i++ {
		err = d.grow(ctx, i, chunk)
	}
	return err
}

func (d *domain) grow(ctx context.Context, n int, chunk int64) error {
	s, err := d.layer(ctx, fmt.Sprint("below", n), chunk)
	if err != nil {
		return err
	}
	d.below = append([]block.Slab{s}, d.below...)
	dev, err := d.attach(ctx, "build", d.below)
	if err != nil {
		return err
	}
	if err := scatter(dev.Path, uint64(n)); err != nil {
		return err
	}
	return d.devices.Detach(ctx, dev)
}

// whole is a candidate without layers: a linear device over a raw slab.
func (d *domain) whole(ctx context.Context) (*candidate, error) {
	s, err := d.raw(ctx, "whole")
	if err != nil {
		return nil, err
	}
	dev, err := d.attach(ctx, "whole", []block.Slab{s})
	return &candidate{name: "depth 0", path: dev.Path}, err
}

// chain is a candidate of so many layers, the uppermost of them new in each round.
func (d *domain) chain(name string, depth int, chunk int64) *candidate {
	id := strings.Map(func(r rune) rune {
		if r == ' ' || r == ',' {
			return '-'
		}
		return unicode.ToLower(r)
	}, name)
	c := &candidate{name: name}
	var dev *block.Device
	c.fresh = func(ctx context.Context) error {
		if dev != nil {
			if err := d.devices.Detach(ctx, *dev); err != nil {
				return err
			}
			if err := d.engine.DetachSlab(ctx, id); err != nil {
				return err
			}
			if err := d.engine.DeleteSlab(ctx, id); err != nil {
				return err
			}
		}
		top, err := d.layer(ctx, id, chunk)
		if err != nil {
			return err
		}
		made, err := d.attach(ctx, id, append([]block.Slab{top}, d.below[len(d.below)-depth:]...))
		if err != nil {
			return err
		}
		if made.Note != "" {
			return fmt.Errorf("%s: %s", c.name, made.Note)
		}
		dev, c.path = &made, made.Path
		return nil
	}
	return c
}
