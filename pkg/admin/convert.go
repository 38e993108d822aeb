package admin

import "github.com/quarry-csi/quarry/pkg/image"

func domainOf(d image.DomainInfo) Domain {
	c := d.Config
	out := Domain{
		ID: d.ID, Name: c.Name, Engine: c.Engine, Scope: c.Scope, Node: c.Node, Aliases: c.Aliases,
		NativeOnly: c.NativeOnly, Overcommit: c.Overcommit, CapacityLimit: c.CapacityLimit,
		Open: d.Open, Problem: d.Problem, Warning: d.Warning, Location: d.Description.Location, Notes: d.Description.Notes,
		Epoch: d.Epoch, Owner: d.Owner, Promised: d.Promised, Capacity: d.Capacity,
		Volumes: d.Volumes, Snapshots: d.Snapshots, Operations: d.Operations,
	}
	for _, k := range d.Description.Kinds {
		out.Kinds = append(out.Kinds, string(k))
	}
	for _, k := range d.Capabilities {
		out.Capabilities = append(out.Capabilities, string(k))
	}
	if u := d.Usage; u != nil {
		out.Usage = &Usage{Total: u.Total, Used: u.Used, Available: u.Available}
	}
	return out
}

func imageOf(i image.Image) Image {
	out := Image{
		Handle: i.Handle.String(), Name: i.Name, Kind: KindSnapshot, Layout: string(i.Layout), Size: i.Size, Promised: i.Promised,
		Slab: i.Slab, Source: i.Source, Created: i.Created, State: string(i.State), Reason: i.Reason,
		Ready: i.Ready, Fresh: i.Fresh, Filesystem: i.Filesystem, Group: i.Group, Inexact: i.Inexact,
		How: i.How, Params: i.Params, Children: i.Children,
		Namespace: i.Described.Namespace, Claim: i.Described.Claim, Volume: i.Described.Volume, Class: i.Described.Class,
	}
	for _, s := range i.Chain {
		out.Slabs = append(out.Slabs, s.ID)
	}
	if i.Mutable {
		out.Kind = KindVolume
	}
	for _, a := range i.Attachments {
		out.Nodes = append(out.Nodes, Attachment{Node: a.Node, Mode: string(a.Mode), Block: a.Block, ReadOnly: a.ReadOnly, Staged: a.Staged})
	}
	return out
}

func operationOf(o image.Operation) Operation {
	return Operation{
		ID: o.ID, Op: o.Op, Domain: o.Domain, Image: o.Image, Name: o.Name, Step: o.Step,
		Done: o.Done, Total: o.Total, Started: o.Started, Path: o.Path, Reason: o.Reason,
	}
}

func findingOf(f image.Finding) Finding {
	return Finding{
		ID: f.ID, Kind: string(f.Kind), Domain: f.Domain, Object: f.Object,
		Message: f.Message, Fix: f.Fix, Bytes: f.Bytes,
	}
}
