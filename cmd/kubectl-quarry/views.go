package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/quarry-csi/quarry/pkg/admin"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// empty says on stderr, as kubectl does, that a table has no rows.
func (c *cli) empty(what string) error {
	_, err := fmt.Fprintf(c.err, "No %s found.\n", what)
	return err
}

func (c *cli) domainsCommand() *cobra.Command {
	return &cobra.Command{
		Use: "domains", Aliases: []string{"domain"}, Short: "List the domains and what they can do", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			domains, err := ask(cmd.Context(), c, func(q *admin.Client) ([]admin.Domain, error) { return q.Domains(cmd.Context()) })
			if err != nil {
				return err
			}
			return c.print(domains, func(w io.Writer, wide bool) error { return c.domainTable(w, domains, wide) })
		},
	}
}

func (c *cli) domainTable(w io.Writer, domains []admin.Domain, wide bool) error {
	if len(domains) == 0 {
		return c.empty("domains")
	}
	header := []string{"NAME", "ID", "ENGINE", "STATUS", "VOLUMES", "SNAPSHOTS", "PROMISED", "AVAILABLE", "USED", "CAPABILITIES"}
	if wide {
		header = append(header, "SCOPE", "NODE", "DEFAULTS", "OVERCOMMIT", "LIMIT", "EPOCH", "OWNER", "LOCATION")
	}
	t := newTable(header...)
	for _, d := range domains {
		cells := []string{d.Name, d.ID, d.Engine, "Unavailable", "", "", "", "", "", ""}
		if d.Open {
			used := ""
			if d.Usage != nil {
				used = size(d.Usage.Used) + "/" + size(d.Usage.Total)
			}
			cells = []string{
				d.Name, d.ID, d.Engine, "Open", fmt.Sprint(d.Volumes), fmt.Sprint(d.Snapshots),
				size(d.Promised), size(d.Capacity), used, strings.Join(d.Capabilities, ","),
			}
		}
		if wide {
			defaults, limit, epoch := "allow", "", ""
			if d.NativeOnly {
				defaults = "native-only"
			}
			if d.CapacityLimit > 0 {
				limit = size(d.CapacityLimit)
			}
			if d.Open {
				epoch = fmt.Sprint(d.Epoch)
			}
			cells = append(cells, d.Scope, d.Node, defaults, fmt.Sprintf("%g", d.Overcommit), limit, epoch, d.Owner, d.Location)
		}
		t.add(cells...)
	}
	if err := t.write(w); err != nil {
		return err
	}
	for _, d := range domains {
		if !d.Open {
			fmt.Fprintf(c.err, "Domain %q is unavailable: %s\n", d.Name, d.Problem)
		} else if d.Warning != "" {
			fmt.Fprintf(c.err, "Domain %q: %s\n", d.Name, d.Warning)
		}
		if wide {
			for _, note := range d.Notes {
				fmt.Fprintf(c.err, "Domain %q: %s\n", d.Name, note)
			}
		}
	}
	return nil
}

func (c *cli) imagesCommand() *cobra.Command {
	var domain, kind string
	cmd := &cobra.Command{
		Use: "images", Aliases: []string{"image"}, Short: "List the volumes and snapshots, hidden and unfinished ones too", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if kind != "" && kind != admin.KindVolume && kind != admin.KindSnapshot {
				return fault.New(fault.Invalid, "--kind %q is not allowed: %s or %s", kind, admin.KindVolume, admin.KindSnapshot)
			}
			images, err := ask(cmd.Context(), c, func(q *admin.Client) ([]admin.Image, error) { return q.Images(cmd.Context()) })
			if err != nil {
				return err
			}
			images = slices.DeleteFunc(images, func(i admin.Image) bool {
				id, _, _ := strings.Cut(i.Handle, "/")
				name, _, _ := strings.Cut(id, ".")
				return domain != "" && domain != id && domain != name || kind != "" && kind != i.Kind
			})
			return c.print(images, func(w io.Writer, wide bool) error { return c.imageTable(w, images, wide) })
		},
	}
	cmd.Flags().StringVar(&domain, "domain", "", "only those of a domain (name or ID)")
	cmd.Flags().StringVar(&kind, "kind", "", "only volume or snapshot")
	return cmd
}

func (c *cli) imageTable(w io.Writer, images []admin.Image, wide bool) error {
	if len(images) == 0 {
		return c.empty("images")
	}
	header := []string{"HANDLE", "NAME", "KIND", "LAYOUT", "SIZE", "STATE", "HOW", "SOURCE", "CLAIM", "AGE"}
	if wide {
		header = append(header, "FILESYSTEM", "NODES", "CLASS", "SLAB", "REASON")
	}
	t := newTable(header...)
	for _, i := range images {
		cells := []string{i.Handle, i.Name, i.Kind, i.Layout, size(i.Size), state(i), i.How, i.Source, claim(i), age(c.now(), i.Created)}
		if wide {
			var nodes []string
			for _, n := range i.Nodes {
				nodes = append(nodes, n.Node)
			}
			cells = append(cells, i.Filesystem, strings.Join(nodes, ","), i.Class, i.Slab, i.Reason)
		}
		t.add(cells...)
	}
	return t.write(w)
}

// state adds to an image's state what a user of it must know.
func state(i admin.Image) string {
	s := i.State
	if i.Inexact {
		s += ",inexact"
	}
	if i.Kind == admin.KindSnapshot && !i.Ready && i.State != "creating" && i.State != "deleting" {
		s += ",not ready"
	}
	return s
}

func claim(i admin.Image) string {
	if i.Namespace == "" {
		return i.Claim
	}
	return i.Namespace + "/" + i.Claim
}

func (c *cli) operationsCommand() *cobra.Command {
	return &cobra.Command{
		Use: "operations", Aliases: []string{"operation", "ops"}, Short: "List the work under way and what is being retried", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ops, err := ask(cmd.Context(), c, func(q *admin.Client) ([]admin.Operation, error) { return q.Operations(cmd.Context()) })
			if err != nil {
				return err
			}
			return c.print(ops, func(w io.Writer, wide bool) error {
				if len(ops) == 0 {
					return c.empty("operations")
				}
				header := []string{"OPERATION", "DOMAIN", "IMAGE", "NAME", "PROGRESS", "PATH", "STEP", "AGE"}
				if wide {
					header = append(header, "ID", "REASON")
				}
				t := newTable(header...)
				for _, o := range ops {
					progress := ""
					if o.Total > 0 {
						progress = fmt.Sprintf("%d%%", int(float64(o.Done)*100/float64(o.Total)))
					}
					cells := []string{o.Op, o.Domain, o.Image, o.Name, progress, o.Path, o.Step, age(c.now(), o.Started)}
					if wide {
						cells = append(cells, o.ID, o.Reason)
					}
					t.add(cells...)
				}
				return t.write(w)
			})
		},
	}
}

func (c *cli) usageCommand() *cobra.Command {
	return &cobra.Command{
		Use: "usage", Short: "Add up what the volumes and snapshots of each namespace take", Args: cobra.NoArgs,
		Long: `Add up what the volumes and snapshots of each namespace take; with -o wide, json or yaml
in each domain.

SIZE is what users see, PROMISED what domains keep for them, ALLOCATED what their slabs
have now: blocks that several share count for each of them. What was deleted and still has its slab counts
for these two. A + says that of some nobody can tell.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := ask(cmd.Context(), c, func(q *admin.Client) ([]admin.NamespaceUsage, error) { return q.Usage(cmd.Context()) })
			if err != nil {
				return err
			}
			return c.print(all, func(w io.Writer, wide bool) error { return c.usageTable(w, all, wide) })
		},
	}
}

func (c *cli) usageTable(w io.Writer, all []admin.NamespaceUsage, wide bool) error {
	if len(all) == 0 {
		return c.empty("images")
	}
	header := []string{"NAMESPACE", "VOLUMES", "SNAPSHOTS", "SIZE", "PROMISED", "ALLOCATED"}
	if wide {
		header = slices.Insert(header, 1, "DOMAIN")
	}
	t := newTable(header...)
	for i := 0; i < len(all); {
		sum := all[i]
		for i++; !wide && i < len(all) && all[i].Namespace == sum.Namespace; i++ {
			sum.Volumes += all[i].Volumes
			sum.Snapshots += all[i].Snapshots
			sum.Size += all[i].Size
			sum.Promised += all[i].Promised
			sum.Allocated += all[i].Allocated
			sum.Unmeasured += all[i].Unmeasured
		}
		allocated := size(sum.Allocated)
		if sum.Unmeasured > 0 {
			allocated += "+"
		}
		cells := []string{sum.Namespace, fmt.Sprint(sum.Volumes), fmt.Sprint(sum.Snapshots), size(sum.Size), size(sum.Promised), allocated}
		if wide {
			cells = slices.Insert(cells, 1, sum.Domain)
		}
		t.add(cells...)
	}
	return t.write(w)
}
