package lvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// Info is a volume group as its metadata says. Sizes are in bytes.
type Info struct {
	UUID         string
	Seqno        int64  // of the metadata that this was read from: see Commit
	SystemID     string // the host that it belongs to; "": any
	LockType     string // of lvmlockd; "": none
	ReadOnly     bool
	Exported     bool
	Clustered    bool
	Missing      int64 // physical volumes that are not there
	Extent       int64
	Size, Free   int64
	MetadataSize int64 // of the smallest metadata area: two copies have to fit
	MetadataFree int64 // what the metadata may still grow by
	Devices      []string
}

// Volume is a logical volume as the metadata says.
type Volume struct {
	Name string
	Size int64 // bytes
	Tags []string
	Pool string // the thin pool that it is in, or empty
	// Used is the part of a thin volume that has space in its pool, in bytes; -1
	// where that is not known: only the kernel knows it, of an active volume.
	Used int64
}

// Details are a volume and what else the metadata say of it.
type Details struct {
	Volume
	UUID     string
	Layout   []string // "linear"; "thin", "sparse"; ...: see lvmreport(7)
	Roles    []string // "public", "origin", ...; "private" of LVM's internal volumes
	Segments []string // the type of each
	Origin   string   // that a snapshot was cut from, while that is there
	ReadOnly bool
}

// Listing is what volumes a group had at one moment.
type Listing struct {
	UUID         string // of the group; "" when no volume was selected
	Seqno        int64  // of the metadata that this was read from: see Commit
	Disks        int64  // physical volumes, also those that are missing
	Missing      int64
	MetadataFree int64
	Volumes      []Volume
}

// Pool is a thin pool. Sizes are in bytes.
type Pool struct {
	Size         int64
	MetadataSize int64
	// DataPercent and MetadataPercent are used; -1: the pool is not active.
	DataPercent, MetadataPercent float64
	ErrorWhenFull                bool
	Zero                         bool // new space is zeroed before its first use
	Health                       string
	// Transaction counts the changes to the pool's set of volumes. LVM's, which Pool
	// reads, is written first: the kernel's, which ActivePool reads, follows it.
	Transaction int64
}

const infoFields = "vg_name,vg_uuid,vg_seqno,vg_systemid,vg_lock_type,vg_permissions,vg_exported,vg_clustered,vg_shared," +
	"vg_missing_pv_count,vg_extent_size,vg_size,vg_free,vg_mda_size,vg_mda_free,pv_name"

// Info reads the group. fault.Unavailable: it is not there. fault.Invalid:
// there are several of that name.
func (g *Group) Info(ctx context.Context) (Info, error) {
	res, err := g.report(ctx, reads, "vgs", "-o", infoFields, g.name)
	if err != nil {
		return Info{}, err
	}
	return g.parseInfo(res.Stdout)
}

func (g *Group) parseInfo(out []byte) (Info, error) {
	rows, err := rows(out, "vg")
	if err != nil {
		return Info{}, err
	}
	if len(rows) == 0 {
		return Info{}, g.vanished(errors.New("the report is empty"))
	}
	r := rows[0]
	info := Info{UUID: r.text("vg_uuid"), Seqno: r.number("vg_seqno"), SystemID: r.text("vg_systemid"), LockType: r.text("vg_lock_type"),
		ReadOnly: r.text("vg_permissions") != "writeable", Exported: r.text("vg_exported") != "",
		Clustered: r.text("vg_clustered") != "" || r.text("vg_shared") != "",
		Missing:   r.number("vg_missing_pv_count"), Extent: r.number("vg_extent_size"), Size: r.number("vg_size"), Free: r.number("vg_free"),
		MetadataSize: r.number("vg_mda_size"), MetadataFree: r.number("vg_mda_free")}
	for _, r := range rows { // one for each physical volume
		if r.text("vg_uuid") != info.UUID {
			return Info{}, fault.New(fault.Invalid, "there are two volume groups named %s (UUIDs %s and %s): rename one (vgrename takes the UUID), or name the disks of the right one in parameter \"devices\"", g.name, info.UUID, r.text("vg_uuid"))
		}
		info.Devices = append(info.Devices, r.text("pv_name"))
	}
	return info, r.err
}

const (
	volumeFields = "vg_uuid,vg_seqno,pv_count,vg_missing_pv_count,vg_mda_free,lv_name,lv_size,lv_tags,pool_lv"
	detailFields = "lv_uuid,lv_layout,lv_role,lv_permissions,origin,segtype"
)

// Volumes lists the volumes whose names are selected: see Names. With used,
// device-mapper is asked for the space that thin volumes take.
func (g *Group) Volumes(ctx context.Context, selection string, used bool) (Listing, error) {
	fields, access := volumeFields, reads
	if used {
		fields, access = fields+",data_percent", kernel
	}
	res, err := g.report(ctx, access, "lvs", "-o", fields, "-S", selection, g.name)
	if err != nil {
		return Listing{}, err
	}
	return parseVolumes(res.Stdout)
}

func parseVolumes(out []byte) (Listing, error) {
	rows, err := rows(out, "lv")
	if err != nil || len(rows) == 0 {
		return Listing{}, err
	}
	l := Listing{UUID: rows[0].text("vg_uuid"), Seqno: rows[0].number("vg_seqno"), Disks: rows[0].number("pv_count"), Missing: rows[0].number("vg_missing_pv_count"),
		MetadataFree: rows[0].number("vg_mda_free"), Volumes: make([]Volume, 0, len(rows))}
	err = rows[0].err
	for _, r := range rows {
		v := Volume{Name: r.text("lv_name"), Size: r.number("lv_size"), Pool: r.text("pool_lv"), Used: -1}
		if tags := r.text("lv_tags"); tags != "" {
			v.Tags = strings.Split(tags, ",")
		}
		if percent := r.values["data_percent"]; percent != "" {
			v.Used = int64(float64(v.Size) / 100 * r.percent("data_percent"))
		}
		if err = errors.Join(err, r.err); err != nil {
			return Listing{}, err
		}
		l.Volumes = append(l.Volumes, v)
	}
	return l, nil
}

// Details lists volumes of those names, LVM's internal ones too, with their details by name.
func (g *Group) Details(ctx context.Context, lvs ...string) (Listing, map[string]Details, error) {
	var names []string
	for _, lv := range lvs {
		names = append(names, lv, "["+lv+"]") // so LVM shows an internal one
	}
	res, err := g.report(ctx, reads, "lvs", "-a", "-o", volumeFields+","+detailFields, "-S", Names(names, nil), g.name)
	if err != nil {
		return Listing{}, nil, err
	}
	return parseDetails(res.Stdout)
}

// parseDetails reads a report with a row for each segment.
func parseDetails(out []byte) (Listing, map[string]Details, error) {
	l, err := parseVolumes(out)
	if err != nil {
		return Listing{}, nil, err
	}
	rows, err := rows(out, "lv")
	if err != nil {
		return Listing{}, nil, err
	}
	all := map[string]Details{}
	for i, r := range rows {
		v := l.Volumes[i]
		v.Name = strings.Trim(v.Name, "[]")
		d := Details{Volume: v, UUID: r.text("lv_uuid"), Layout: strings.Split(r.text("lv_layout"), ","), Roles: strings.Split(r.text("lv_role"), ","),
			Segments: append(all[v.Name].Segments, r.text("segtype")), Origin: strings.Trim(r.text("origin"), "[]"),
			ReadOnly: strings.HasPrefix(r.text("lv_permissions"), "read-only")}
		if r.err != nil {
			return Listing{}, nil, r.err
		}
		all[v.Name] = d
	}
	return l, all, nil
}

// Names is a selection for Volumes: whole names, and beginnings of names.
func Names(whole, beginnings []string) string {
	var or []string
	for _, n := range whole {
		or = append(or, fmt.Sprintf(`lv_name="%s"`, n))
	}
	for _, b := range beginnings {
		or = append(or, fmt.Sprintf(`lv_name=~"^%s"`, strings.NewReplacer(".", "[.]", "+", "[+]").Replace(b)))
	}
	return strings.Join(or, "||")
}

const poolFields = "lv_name,lv_layout,lv_size,lv_metadata_size,data_percent,metadata_percent,lv_when_full,zero,transaction_id,lv_health_status"

// Pool reads a thin pool. fault.NotFound: no such volume. fault.Invalid: it is
// no thin pool.
func (g *Group) Pool(ctx context.Context, name string) (Pool, error) {
	res, err := g.report(ctx, kernel, "lvs", "-o", poolFields, g.path(name))
	if err != nil {
		return Pool{}, err
	}
	return g.parsePool(res.Stdout, name)
}

func (g *Group) parsePool(out []byte, name string) (Pool, error) {
	rows, err := rows(out, "lv")
	if err != nil {
		return Pool{}, err
	}
	if len(rows) != 1 {
		return Pool{}, fault.New(fault.NotFound, "volume group %s has no logical volume %s", g.name, name)
	}
	r := rows[0]
	if layout := strings.Split(r.text("lv_layout"), ","); !slices.Contains(layout, "thin") || !slices.Contains(layout, "pool") {
		return Pool{}, fault.New(fault.Invalid, "%s is no thin pool (its layout is %q)", g.path(name), r.text("lv_layout"))
	}
	p := Pool{Size: r.number("lv_size"), MetadataSize: r.number("lv_metadata_size"), DataPercent: -1, MetadataPercent: -1,
		ErrorWhenFull: r.text("lv_when_full") == "error", Zero: r.text("zero") == "zero", Health: r.text("lv_health_status"), Transaction: r.number("transaction_id")}
	if r.text("data_percent") != "" {
		p.DataPercent, p.MetadataPercent = r.percent("data_percent"), r.percent("metadata_percent")
	}
	return p, r.err
}

func (g *Group) report(ctx context.Context, a access, program string, args ...string) (host.Result, error) {
	return g.lvm(ctx, a, program, append([]string{"--reportformat", "json", "--units", "b", "--nosuffix"}, args...)...)
}

// row of a report; err is the first field that could not be read.
type row struct {
	values map[string]string
	err    error
}

// rows takes the rows of one kind from a report.
func rows(out []byte, kind string) ([]*row, error) {
	var doc struct {
		Report []map[string][]map[string]string `json:"report"`
	}
	if err := json.Unmarshal(out, &doc); err != nil {
		return nil, fault.New(fault.Internal, "the report of lvm2 cannot be read: %w", err)
	}
	var all []*row
	for _, r := range doc.Report {
		for _, values := range r[kind] {
			all = append(all, &row{values: values})
		}
	}
	return all, nil
}

func (r *row) text(field string) string {
	v, ok := r.values[field]
	if !ok && r.err == nil {
		r.err = fault.New(fault.Internal, "the report of lvm2 has no field %q", field)
	}
	return v
}

func (r *row) number(field string) int64 {
	n, err := strconv.ParseInt(r.text(field), 10, 64)
	r.bad(field, err)
	return n
}

func (r *row) percent(field string) float64 {
	n, err := strconv.ParseFloat(r.text(field), 64)
	r.bad(field, err)
	return n
}

func (r *row) bad(field string, err error) {
	if err != nil && r.err == nil {
		r.err = fault.New(fault.Internal, "the report of lvm2: field %q: %w", field, err)
	}
}
