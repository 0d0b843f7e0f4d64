-- The room of d4 in Luanti: tells what the player has and does, and builds what an episode begins with.
--
-- Two files lie beside the world, both renamed into place, so that neither is ever seen half-written:
--   order.json  by d4, read at every step of the server. `number` counts orders, `kind` is "arena" (with
--               `trunk` {x, z, height}, `yaw`, `pitch` in radians) or "wild" (with `places` {{x, z}, ...}).
--   state.json  by this mod at every step; tell() says what is in it.
-- Names in them are the game's own.

local FOLDER = core.get_worldpath()
local GROUND = 8 -- height of the arena's grass
local EMERGED, BUILT = 40, 24 -- nodes to each side of the arena's middle
local LOW, HIGH = GROUND - 6, GROUND + 12
local SETTLES = 4 -- steps between building and being ready
local REACH, EYE = 4, 1.47
local TRUNK, CROWN = "default:tree", "default:leaves"

local step, read, order = 0, "", {number = 0}
local phase, why, wait = "idle", "", 0
local stats, trunk, place = {}, {}, 0
local keys, speed = {}, 1
local untouched -- the arena as it was made

-- Nothing is written across the picture.
core.get_server_status = function() end
core.send_join_message = function() end
core.send_leave_message = function() end

if core.get_mapgen_setting("mg_name") == "flat" then
	core.clear_registered_ores()
	core.clear_registered_decorations()
	core.clear_registered_biomes()
	core.register_biome({
		name = "d4_plain", node_top = "default:dirt_with_grass", depth_top = 1, node_filler = "default:dirt",
		depth_filler = 3, y_min = -31000, y_max = 31000, heat_point = 50, humidity_point = 50,
	})
	for name, share in pairs({
		["default:grass_2"] = 0.02, ["default:grass_4"] = 0.02, ["flowers:dandelion_yellow"] = 0.002,
		["flowers:rose"] = 0.002,
	}) do
		core.register_decoration({
			deco_type = "simple", place_on = "default:dirt_with_grass", fill_ratio = share, decoration = name,
		})
	end
end

-- ---- what is told ----

local function count(kind, name, amount)
	stats[kind] = stats[kind] or {}
	stats[kind][name] = (stats[kind][name] or 0) + amount
end

local function items_of(player)
	local items = {}
	for _, list in ipairs({"main", "craft"}) do
		for _, stack in ipairs(player:get_inventory():get_list(list) or {}) do
			if not stack:is_empty() then
				items[stack:get_name()] = (items[stack:get_name()] or 0) + stack:get_count()
			end
		end
	end
	return items
end

local function tell(player)
	local state = {step = step, number = order.number, phase = phase, why = why}
	if player then
		local pos = player:get_pos()
		state.player = {
			yaw = player:get_look_horizontal(), pitch = player:get_look_vertical(), x = pos.x, y = pos.y, z = pos.z,
			slot = player:get_wield_index() - 1, keys = player:get_player_control_bits(), items = items_of(player),
		}
		state.stats, state.trunk = stats, trunk
	end
	core.safe_file_write(FOLDER .. "/state.json", core.write_json(state))
end

core.register_on_dignode(function(pos, node, digger)
	count("dig", node.name, 1)
	local tool = digger and digger:get_wielded_item():get_name()
	if tool and tool ~= "" and core.registered_tools[tool] then
		count("use", tool, 1)
	end
	for i, log in ipairs(trunk) do
		if log[1] == pos.x and log[2] == pos.y and log[3] == pos.z then
			table.remove(trunk, i)
			break
		end
	end
end)

core.register_on_placenode(function(_, node)
	count("place", node.name, 1)
end)

core.register_on_craft(function(stack)
	count("craft", stack:get_name(), stack:get_count())
end)

for _, name in ipairs({"default:furnace", "default:furnace_active"}) do
	local before = core.registered_nodes[name].on_metadata_inventory_take
	core.override_item(name, {
		on_metadata_inventory_take = function(pos, list, index, stack, player)
			if list == "dst" then
				count("craft", stack:get_name(), stack:get_count())
			end
			return before and before(pos, list, index, stack, player)
		end,
	})
end

-- A furnace is opened by the client, which tells nobody: it is what happens where one is pointed at.
local function watch_opening(player)
	local eye = vector.offset(player:get_pos(), 0, EYE, 0)
	local far = vector.add(eye, vector.multiply(player:get_look_dir(), REACH))
	for thing in core.raycast(eye, far, false) do
		local name = core.get_node(thing.under).name
		if name == "default:furnace" or name == "default:furnace_active" then
			count("open", "default:furnace", 1)
		end
		return
	end
end

-- ---- what is built ----

local function fail(reason)
	phase, why = "failed", reason
end

local function emerge(low, high, done)
	phase = "emerging"
	local number, bad = order.number, 0
	core.emerge_area(low, high, function(_, action, left)
		if number ~= order.number then
			return -- of an order that is no longer wanted
		end
		if action == core.EMERGE_CANCELLED or action == core.EMERGE_ERRORED then
			bad = bad + 1
		end
		if left == 0 and bad > 0 then
			fail(bad .. " pieces of the world were not made")
		elseif left == 0 then
			done()
		end
	end)
end

local function equip(player, pos, yaw, pitch)
	for _, list in ipairs({"main", "craft"}) do
		player:get_inventory():set_list(list, {})
	end
	for _, object in ipairs(core.get_objects_inside_radius(pos, 100)) do
		if not object:is_player() then
			object:remove()
		end
	end
	player:set_hp(20)
	player:add_velocity(vector.multiply(player:get_velocity(), -1))
	player:set_pos(pos)
	player:set_look_horizontal(yaw)
	player:set_look_vertical(pitch)
	stats, keys, phase, wait = {}, {}, "built", SETTLES
end

local function copy(values)
	local out = {}
	for i = 1, #values do
		out[i] = values[i]
	end
	return out
end

local function build_arena(player)
	local vm = core.get_voxel_manip()
	local low, high = vm:read_from_map({x = -BUILT, y = LOW, z = -BUILT}, {x = BUILT, y = HIGH, z = BUILT})
	if not untouched then
		untouched = {nodes = vm:get_data(), turns = vm:get_param2_data()}
	end
	local nodes, turns = copy(untouched.nodes), copy(untouched.turns)
	local area = VoxelArea:new({MinEdge = low, MaxEdge = high})
	local function set(x, y, z, name)
		local i = area:index(x, y, z)
		nodes[i], turns[i] = core.get_content_id(name), 0
	end
	local x, z, height = order.trunk.x, order.trunk.z, order.trunk.height
	trunk = {}
	for y = GROUND + 1, GROUND + height do
		set(x, y, z, TRUNK)
		table.insert(trunk, {x, y, z})
	end
	for dx = -2, 2 do
		for dz = -2, 2 do
			local far = math.abs(dx) + math.abs(dz)
			if far < 4 then
				set(x + dx, GROUND + height + 1, z + dz, CROWN)
			end
			if far < 2 then
				set(x + dx, GROUND + height + 2, z + dz, CROWN)
			end
		end
	end
	set(0, GROUND + 1, 0, "air") -- no grass in front of the eyes
	vm:set_data(nodes)
	vm:set_param2_data(turns)
	vm:write_to_map(true)
	equip(player, {x = 0, y = GROUND + 0.5, z = 0}, order.yaw, order.pitch)
end

local function has_trees(pos)
	local low, high = vector.offset(pos, -32, -16, -32), vector.offset(pos, 32, 16, 32)
	return #core.find_nodes_in_area(low, high, {"group:tree"}) > 0
end

-- The first of the places with dry ground under the open sky and a tree in sight.
local function settle_wild(player)
	place = place + 1
	local at = order.places[place]
	if not at then
		return fail("none of " .. #order.places .. " places is on land with trees")
	end
	local level = core.get_spawn_level(at[1], at[2])
	if not level then
		return settle_wild(player)
	end
	local low, high = {x = at[1] - 48, y = level - 24, z = at[2] - 48}, {x = at[1] + 48, y = level + 40, z = at[2] + 48}
	emerge(low, high, function()
		for y = level + 16, level - 16, -1 do
			local pos = {x = at[1], y = y, z = at[2]}
			local node = core.registered_nodes[core.get_node(pos).name]
			if not node or node.liquidtype ~= "none" or node.groups.leaves or node.groups.tree then
				break
			elseif node.walkable then
				if has_trees(pos) then
					return equip(player, vector.offset(pos, 0, 0.5, 0), order.yaw, order.pitch)
				end
				break
			end
		end
		settle_wild(player)
	end)
end

local function begin(player)
	why, trunk, place = "", {}, 0
	if order.kind == "wild" then
		settle_wild(player)
	else
		local low, high = {x = -EMERGED, y = LOW, z = -EMERGED}, {x = EMERGED, y = HIGH, z = EMERGED}
		emerge(low, high, function() build_arena(player) end)
	end
end

-- ---- at every step ----

local function read_order(player)
	local file = io.open(FOLDER .. "/order.json", "r")
	if not file then
		return
	end
	local text = file:read("*a")
	file:close()
	if text ~= read then
		read = text
		local new = core.parse_json(text)
		if new and new.number > order.number then
			order = new
			begin(player)
		end
	end
end

core.register_globalstep(function()
	step = step + 1
	local player = core.get_connected_players()[1]
	if player then
		read_order(player)
		if phase == "built" then
			wait = wait - 1
			phase = wait > 0 and "built" or "ready"
		end
		local now = player:get_player_control()
		if now.place and not keys.place and not now.sneak then
			watch_opening(player)
		end
		keys = now
		local wanted = now.aux1 and now.up and 1.3 or 1 -- as fast as sprinting is in Minecraft
		if wanted ~= speed then
			speed = wanted
			player:set_physics_override({speed = speed})
		end
	end
	tell(player)
end)
