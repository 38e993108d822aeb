package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/quarry-csi/quarry/pkg/admin"
)

func (c *cli) chainCommand() *cobra.Command {
	return &cobra.Command{
		Use: "chain IMAGE", Short: "Draw what an image came from, what came of it, and its slabs",
		Long: `Draw what an image came from, what came of it, and its slabs.

IMAGE is a handle, the unique beginning of one (with or without its domain), or
the name that CSI gave it, which in Kubernetes is that of the PersistentVolume.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			chain, err := ask(cmd.Context(), c, func(q *admin.Client) (admin.Chain, error) { return q.Chain(cmd.Context(), args[0]) })
			if err != nil {
				return err
			}
			return c.print(chain, func(w io.Writer, _ bool) error { return c.drawChain(w, chain) })
		},
	}
}

// drawChain draws the lineage as a tree. An image stands after its source in
// it, so that its depth is known when it comes.
func (c *cli) drawChain(w io.Writer, chain admin.Chain) error {
	tw := tabwriter.NewWriter(w, 6, 4, 3, ' ', 0)
	fmt.Fprintln(tw, "LINEAGE\tNAME\tKIND\tSIZE\tSTATE\tHOW\tAGE")
	children := map[string][]admin.Image{}
	in := map[string]bool{}
	for _, i := range chain.Lineage {
		in[i.Handle] = true
	}
	var roots []admin.Image
	for n, i := range chain.Lineage {
		// The first is the root even where records make a circle.
		if n > 0 && in[i.Source] {
			children[i.Source] = append(children[i.Source], i)
		} else {
			roots = append(roots, i)
		}
	}
	var draw func(i admin.Image, first, rest string)
	draw = func(i admin.Image, first, rest string) {
		row := newTable()
		mark := ""
		if i.Handle == chain.Image.Handle {
			mark = " *"
		}
		row.add(first+i.Handle+mark, i.Name, i.Kind, size(i.Size), state(i), i.How, age(c.now(), i.Created))
		fmt.Fprintln(tw, strings.Join(row.rows[1], "\t"))
		for n, child := range children[i.Handle] {
			branch, below := "├─ ", "│  "
			if n == len(children[i.Handle])-1 {
				branch, below = "└─ ", "   "
			}
			draw(child, rest+branch, rest+below)
		}
	}
	for _, r := range roots {
		if r.Source != "" && !in[r.Source] {
			fmt.Fprintf(tw, "%s (deleted)\t\t\t\t\t\t\n", r.Source)
			draw(r, "└─ ", "   ")
			continue
		}
		draw(r, "", "")
	}
	fmt.Fprintf(tw, "\nSLABS\n")
	switch len(chain.Slabs) {
	case 0:
		fmt.Fprintln(tw, none)
	case 1:
		fmt.Fprintf(tw, "%s   (head and base)\n", chain.Slabs[0])
	default:
		for n, s := range chain.Slabs {
			end := ""
			switch n {
			case 0:
				end = "   (head)"
			case len(chain.Slabs) - 1:
				end = "   (base)"
			}
			fmt.Fprintf(tw, "%s%s\n", s, end)
		}
	}
	return tw.Flush()
}
