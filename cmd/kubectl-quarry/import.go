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

func (c *cli) importCommand() *cobra.Command {
	var req admin.ImportRequest
	var claim, mode string
	cmd := &cobra.Command{
		Use: "import NAME --domain DOMAIN --source SOURCE", Short: "Make a volume of a file or logical volume that is there already, and print its PersistentVolume",
		Long: `Make a volume of what lies in a domain's storage already, and print its
PersistentVolume: with -o yaml, for kubectl apply. No bytes move. The name is the
volume's and the PersistentVolume's.

SOURCE of engine dir is a file with the image of a file system (or, with --block, of
anything) in the folder "import" of the domain's directory: put it there first, with mv,
or with cp --reflink=auto --sparse=always. Nobody may have it open. Afterwards it is
Quarry's: it has its old name no more. If something fails, it stays where it was.

SOURCE of engine lvm is a logical volume of the domain's volume group, by its name without
the group's: a linear or striped one, or of the domain's thin pool. Nobody may have it open
or mounted. If something fails, it gets its name back.

The same command again does nothing more, and prints the same.`,
		Example: `  kubectl quarry import legacy --domain local --source disk.img --dry-run
  kubectl quarry import legacy --domain local --source disk.img --claim shop/data -o yaml | kubectl apply -f -`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Name = args[0]
			modes := []string{"ReadWriteOnce", "ReadWriteOncePod", "ReadOnlyMany"}
			if !slices.Contains(modes, mode) {
				return fault.New(fault.Invalid, "--access-mode %q is not allowed: %s", mode, strings.Join(modes, ", "))
			}
			if claim != "" {
				var ok bool
				if req.Namespace, req.Claim, ok = strings.Cut(claim, "/"); !ok || req.Namespace == "" || req.Claim == "" {
					return fault.New(fault.Invalid, "--claim %q: must be NAMESPACE/NAME", claim)
				}
			}
			done, err := ask(cmd.Context(), c, func(q *admin.Client) (admin.Imported, error) { return q.Import(cmd.Context(), req) })
			if err != nil {
				return err
			}
			if done.DryRun {
				_, err := fmt.Fprintf(c.out, "Would be imported: volume %q of domain %s, %s with %s. Nothing was changed.\n", req.Name, strings.TrimSuffix(done.Image.Handle, "/"), size(done.Image.Size), filesystem(done.Image))
				return err
			}
			return c.print(manifest(done, req, mode), func(w io.Writer, _ bool) error {
				_, err := fmt.Fprintf(w, "Imported: volume %q is %s, %s with %s.\nThe same command with -o yaml prints its PersistentVolume.\n", req.Name, done.Image.Handle, size(done.Image.Size), filesystem(done.Image))
				return err
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.Domain, "domain", "", "the domain (name or ID)")
	f.StringVar(&req.Source, "source", "", "what to import: the name of a file in the domain's folder import, or of a logical volume of its group")
	f.BoolVar(&req.Block, "block", false, "a raw block volume, whatever it holds")
	f.StringVar(&req.Filesystem, "fstype", "", "fail unless it holds this file system: ext4, xfs or btrfs")
	f.StringVar(&claim, "claim", "", "reserve the PersistentVolume for this claim: NAMESPACE/NAME")
	f.StringVar(&mode, "access-mode", "ReadWriteOnce", "of the PersistentVolume: ReadWriteOnce, ReadWriteOncePod or ReadOnlyMany")
	f.BoolVar(&req.DryRun, "dry-run", false, "look at it, and change nothing")
	cobra.CheckErr(cmd.MarkFlagRequired("domain"))
	cobra.CheckErr(cmd.MarkFlagRequired("source"))
	return cmd
}

func filesystem(i admin.Image) string {
	if i.Filesystem == "" {
		return "raw blocks"
	}
	return i.Filesystem
}

// object is a part of a manifest, printed in the order of its keys.
type object = map[string]any

// manifest is the PersistentVolume of an imported volume.
func manifest(done admin.Imported, req admin.ImportRequest, mode string) object {
	source := object{"driver": done.Driver, "volumeHandle": done.Image.Handle}
	volumeMode := "Block"
	if !req.Block {
		volumeMode, source["fsType"] = "Filesystem", done.Image.Filesystem
	}
	spec := object{
		"capacity": object{"storage": fmt.Sprint(done.Image.Size)}, "accessModes": []string{mode}, "volumeMode": volumeMode,
		"persistentVolumeReclaimPolicy": "Retain", "storageClassName": "", "csi": source,
	}
	if done.Node != "" {
		spec["nodeAffinity"] = object{"required": object{"nodeSelectorTerms": []object{{"matchExpressions": []object{
			{"key": topologyKey, "operator": "In", "values": []string{done.Node}}}}}}}
	}
	if req.Claim != "" {
		spec["claimRef"] = object{"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": req.Namespace, "name": req.Claim}
	}
	return object{"apiVersion": "v1", "kind": "PersistentVolume", "metadata": object{"name": req.Name}, "spec": spec}
}

// topologyKey is csi.TopologyKey, whose package would bring all of CSI along.
const topologyKey = "csi.quarry.dev/node"
