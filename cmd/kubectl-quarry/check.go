package main

import (
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/spf13/cobra"

	"github.com/quarry-csi/quarry/pkg/admin"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

const kindsHelp = `  clean      frees space; Quarry does it by itself after a while
  optimize   makes a degraded image optimized
  merge      shortens a chain; Quarry does it by itself after a while
  mend       makes a broken image usable
  report     only a person can help`

func (c *cli) checkCommand() *cobra.Command {
	return &cobra.Command{
		Use: "check [DOMAIN]", Short: "Look for what is wrong or could be better, changing nothing",
		Long: `Look for what is wrong or could be better in a domain (name or ID) or in all,
changing nothing and holding nothing up. The kinds of finding:

` + kindsHelp + `

In Kubernetes it also reports images that no PersistentVolume or VolumeSnapshotContent
names, and those of these whose image is not there. Nothing ever acts upon these.

Exit status: 0, nothing needs a person (findings that Quarry deals with by
itself may be there); 2, something is to be mended or only a person can help, or
a domain could not be checked; 1, the check itself failed.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			checked, err := ask(cmd.Context(), c, func(q *admin.Client) (admin.Checked, error) { return q.Check(cmd.Context(), first(args)) })
			if err != nil {
				return err
			}
			if err := c.print(checked, func(w io.Writer, _ bool) error {
				if len(checked.Findings) == 0 {
					return c.empty("findings")
				}
				return findingTable(w, checked.Findings)
			}); err != nil {
				return err
			}
			c.unchecked(checked.Unchecked)
			n := 0
			for _, f := range checked.Findings {
				if f.Fix == "" || f.Kind == string(image.FindingMend) || f.Kind == string(image.FindingReport) {
					n++
				}
			}
			switch {
			case n > 0:
				return needsPerson{fmt.Sprintf("%d of %d findings need a person: kubectl quarry fix shows what can be done.", n, len(checked.Findings))}
			case len(checked.Unchecked) > 0:
				return needsPerson{"Not everything could be checked."}
			}
			return nil
		},
	}
}

func first(args []string) string {
	if len(args) == 0 {
		return ""
	}
	return args[0]
}

func (c *cli) unchecked(domains map[string]string) {
	for _, d := range slices.Sorted(maps.Keys(domains)) {
		if d == admin.Kubernetes {
			fmt.Fprintf(c.err, "What Kubernetes knows could not be checked: %s\n", domains[d])
			continue
		}
		fmt.Fprintf(c.err, "Domain %q could not be checked: %s\n", d, domains[d])
	}
}

func findingTable(w io.Writer, findings []admin.Finding) error {
	t := newTable("ID", "KIND", "DOMAIN", "OBJECT", "FREES", "MESSAGE", "FIX")
	for _, f := range findings {
		frees := ""
		if f.Bytes > 0 {
			frees = size(f.Bytes)
		}
		t.add(f.ID, f.Kind, f.Domain, f.Object, frees, f.Message, f.Fix)
	}
	return t.write(w)
}

func (c *cli) fixCommand() *cobra.Command {
	var req admin.FixRequest
	cmd := &cobra.Command{
		Use: "fix [DOMAIN]", Short: "Act on what a check finds; without --yes, only show what would be done",
		Long: `Act on what a check finds in a domain (name or ID) or in all. Without --yes
nothing is changed: what would be done is shown. With --yes every finding is
verified again before it is acted upon. The kinds of finding:

` + kindsHelp + `

Exit status: 0, done (or shown); 2, something was not done; 1, nothing could be.`,
		Example: `  kubectl quarry fix                          # what would be done
  kubectl quarry fix local --kind clean --yes # free what can be freed
  kubectl quarry fix --id ID --yes            # one finding`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			known := []string{string(image.FindingClean), string(image.FindingOptimize), string(image.FindingMerge), string(image.FindingMend), string(image.FindingReport)}
			for _, k := range req.Kinds {
				if !slices.Contains(known, k) {
					return fault.New(fault.Invalid, "--kind %q is not allowed: clean, optimize, merge, mend or report", k)
				}
			}
			req.Domain = first(args)
			result, err := ask(cmd.Context(), c, func(q *admin.Client) (admin.FixResult, error) { return q.Fix(cmd.Context(), req) })
			if err != nil {
				return err
			}
			if err := c.print(result, func(w io.Writer, _ bool) error { return c.fixTable(w, result) }); err != nil {
				return err
			}
			c.unchecked(result.Unchecked)
			return fixStatus(result)
		},
	}
	cmd.Flags().StringSliceVar(&req.IDs, "id", nil, "only these findings")
	cmd.Flags().StringSliceVar(&req.Kinds, "kind", nil, "only these kinds of finding")
	cmd.Flags().BoolVarP(&req.Apply, "yes", "y", false, "do it")
	return cmd
}

func (c *cli) fixTable(w io.Writer, r admin.FixResult) error {
	if len(r.Results) == 0 {
		return c.empty("findings")
	}
	for _, f := range r.Results {
		what := f.ID
		if f.Object != "" {
			what = fmt.Sprintf("%s (%s %s/%s)", f.ID, f.Kind, f.Domain, f.Object)
		}
		said := f.Done
		switch {
		case f.Error != "":
			said = "not fixed: " + f.Error
			if f.Message != "" {
				said += " (" + f.Message + ")"
			}
		case !r.Applied:
			said = fmt.Sprintf("would be fixed: %s (%s)", f.Fix, f.Message)
		default:
			said = "fixed: " + said
		}
		if _, err := fmt.Fprintf(w, "finding %s %s\n", what, said); err != nil {
			return err
		}
	}
	if !r.Applied {
		fmt.Fprintln(c.err, "Dry run: nothing was changed. Add --yes to do it.")
	}
	return nil
}

func fixStatus(r admin.FixResult) error {
	failed := 0
	for _, f := range r.Results {
		if f.Error != "" {
			failed++
		}
	}
	switch {
	case r.Applied && failed > 0:
		return needsPerson{fmt.Sprintf("%d of %d findings were not fixed.", failed, len(r.Results))}
	case len(r.Unchecked) > 0:
		return needsPerson{"Not everything could be checked."}
	}
	return nil
}
